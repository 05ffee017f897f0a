"use strict";
// The volcano plot, and the form: long pasted texts are kept by the server instead of the address.
(() => {
  const LONG = 1500, TOP = 30;
  const form = document.getElementById("compare");

  if (form) {
    const sides = ["a", "b"].map((key) => [form.elements[key], form.elements[`${key}_text`]]);
    const show = () => sides.forEach(([choice, area]) => { area.hidden = !choice.value.endsWith("=text:"); });
    form.addEventListener("change", show);
    show();
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const wrong = form.querySelector(".mistake"), at = new URL(form.action);
      wrong.hidden = true;
      const given = new FormData(form);
      try {
        for (const [choice, area] of sides) {
          const pasted = choice.value.endsWith("=text:"), long = area.value.length > LONG;
          given.delete(area.name);
          if (!pasted) continue;
          const source = long ? (await gemscope.post("/api/compare/texts", { text: area.value })).source : `text:${area.value}`;
          given.set(choice.name, choice.value.replace("text:", source));
        }
        at.search = new URLSearchParams(given);
        location.href = at;
      } catch (error) { wrong.textContent = error.message; wrong.hidden = false; }
    });
  }

  async function draw(box) {
    const plot = box.querySelector(".plot"), tip = box.querySelector(".tip"), legend = box.querySelector(".legend");
    const answer = await fetch(box.dataset.url), record = await answer.json();
    if (!answer.ok) { plot.textContent = record.detail; plot.className = "mistake"; return; }
    const rows = record.rows.filter((r) => r.density_a + r.density_b > 0).sort((x, y) => x.log_odds - y.log_odds);
    const high = rows.map((r) => Math.min(TOP, -Math.log10(Math.max(r.q, 1e-300))));
    const capped = rows.some((r) => r.q < 10 ** -TOP);
    const told = (r) => r.q <= record.q;
    const only = (test) => rows.map((r, i) => (test(r) ? high[i] : null));
    const data = [rows.map((r) => r.log_odds), only((r) => !told(r)), only((r) => told(r) && r.log_odds > 0), only((r) => told(r) && r.log_odds <= 0)];
    const names = [box.dataset.rest, box.dataset.a, box.dataset.b], colours = ["soft", "accent", "cool"];
    let chart = null, hovered = -1;

    function make() {
      const colour = gemscope.colour, axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 }, labelFont: "12px system-ui, sans-serif", font: "11px system-ui, sans-serif", labelSize: 22 };
      if (chart) chart.destroy();
      const dot = (k) => ({ label: names[k], paths: () => null, points: { show: true, size: k ? 6 : 4, width: 0, fill: colour(colours[k]), stroke: colour(colours[k]) } });
      const x = Math.max(0.5, ...rows.map((r) => Math.abs(r.log_odds))) * 1.06, y = Math.max(2, ...high) * 1.06;
      chart = new uPlot({
        title: box.dataset.title, width: plot.clientWidth, height: plot.clientWidth < 600 ? 340 : 420,
        legend: { show: false }, cursor: { points: { show: false }, x: false, y: false, drag: { x: true, y: true, uni: 12 } },
        scales: { x: { time: false, range: (u, a, b) => (u.zoomed ? [a, b] : [-x, x]) }, y: { range: (u, a, b) => (u.zoomed ? [a, b] : [0, y]) } },
        axes: [{ ...axis, label: plot.clientWidth < 600 ? box.dataset.narrow : box.dataset.x }, { ...axis, label: box.dataset.y, size: 44 }],
        series: [{}, dot(0), dot(1), dot(2)],
        hooks: {
          setSelect: [(u) => { u.zoomed = u.select.width > 0; }],
          draw: [(u) => {
            const pen = u.ctx, at = u.valToPos(-Math.log10(Math.max(record.q, 1e-30)), "y", true);
            pen.save(); pen.strokeStyle = colour("soft"); pen.setLineDash([5, 4]); pen.lineWidth = 1;
            if (at > u.bbox.top && at < u.bbox.top + u.bbox.height) {
              pen.beginPath(); pen.moveTo(u.bbox.left, at); pen.lineTo(u.bbox.left + u.bbox.width, at); pen.stroke();
              pen.fillStyle = colour("soft"); pen.font = `${11 * devicePixelRatio}px system-ui, sans-serif`; pen.textAlign = "right";
              pen.fillText(box.dataset.line, u.bbox.left + u.bbox.width - 4, at - 4);
            }
            if (hovered >= 0) {
              pen.setLineDash([]); pen.strokeStyle = colour("ink"); pen.lineWidth = 2 * devicePixelRatio; pen.beginPath();
              pen.arc(u.valToPos(data[0][hovered], "x", true), u.valToPos(high[hovered], "y", true), 6 * devicePixelRatio, 0, 7); pen.stroke();
            }
            pen.restore();
          }],
        },
      }, data, plot);
      chart.over.addEventListener("dblclick", () => { chart.zoomed = false; chart.setData(data); });
      chart.over.addEventListener("mousemove", (event) => hover(event.offsetX, event.offsetY));
      chart.over.addEventListener("mouseleave", () => tell(-1));
      let down = null;
      chart.over.addEventListener("mousedown", (event) => { down = [event.clientX, event.clientY]; });
      chart.over.addEventListener("click", (event) => {
        if (hovered >= 0 && down && Math.hypot(event.clientX - down[0], event.clientY - down[1]) < 4) location.href = `${box.dataset.features}${rows[hovered].feature}`;
      });
      legend.replaceChildren();
      [1, 2, 0].forEach((k) => {
        const one = document.createElement("span"), mark = document.createElement("i");
        mark.style.background = colour(colours[k]); one.append(mark, names[k]); legend.append(one);
      });
      if (capped) legend.append(box.dataset.capped);
    }
    function hover(left, top) {
      let best = -1, least = 144;
      for (let i = 0; i < rows.length; i++) {
        const d = (chart.valToPos(data[0][i], "x") - left) ** 2 + (chart.valToPos(high[i], "y") - top) ** 2;
        if (d < least) { least = d; best = i; }
      }
      tell(best);
    }
    function tell(i) {
      if (i === hovered) return;
      hovered = i; tip.hidden = i < 0; plot.classList.toggle("on-feature", i >= 0);
      if (i >= 0) {
        const r = rows[i], head = document.createElement("b"), more = document.createElement("span");
        head.textContent = `${r.feature} `;
        const share = (v) => `${(100 * v).toPrecision(2)}%`;
        more.textContent = `${record.a.name} ${share(r.density_a)} · ${record.b.name} ${share(r.density_b)} · ${r.log_odds.toFixed(2)} · q ${r.q.toPrecision(2)}`;
        tip.replaceChildren(head, record.explanations[r.feature] || "", more);
        const x = chart.valToPos(data[0][i], "x") + chart.over.offsetLeft + 12, y = chart.valToPos(high[i], "y") + chart.over.offsetTop + plot.offsetTop + 30;
        tip.style.left = `${Math.max(4, Math.min(x, plot.clientWidth - tip.offsetWidth - 6))}px`; tip.style.top = `${y}px`;
      }
      chart.redraw(false);
    }
    make();
    let width = plot.clientWidth;
    new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; chart.setSize({ width, height: width < 600 ? 340 : 420 }); } }).observe(plot);
    document.addEventListener("gemscope:theme", make);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", make);
    box.dataset.ready = String(rows.length);
  }
  function find() {
    const box = document.getElementById("volcano");
    if (box && !box.dataset.begun) { box.dataset.begun = "1"; draw(box); }
  }
  document.addEventListener("htmx:afterSwap", find);
  find();
})();
