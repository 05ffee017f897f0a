"use strict";
// The steer page: rows of features with sliders, two streams of text, a dose curve.
(() => {
  const byId = (id) => document.getElementById(id);
  const form = byId("steer"), edits = byId("edits"), go = byId("go"), stop = byId("stop"), state = byId("state"), wrong = byId("wrong");
  const units = JSON.parse(form.dataset.units);
  const text = (tag, words, cls) => { const made = document.createElement(tag); made.textContent = words; if (cls) made.className = cls; return made; };
  let running = null, measuring = null, charts = [];

  // ---- one row -------------------------------------------------------------------------------
  const part = (row, name) => row.querySelector(name);
  const maximum = (row) => Number(row.dataset.max) || 0;
  function takes(row) { return (units[part(row, '[name="mode"]').value] || []).filter((u) => u !== "xmax" || maximum(row) > 0); }

  // What the row's address says, into its fields.
  function read(row) {
    const said = /^\s*([^x]*)(x\w+)?\s*$/.exec(part(row, '[name="strength"]').value) || [];
    const amount = said[1] && said[1].trim() !== "" ? Number(said[1]) : 1;
    part(row, ".amount").value = Number.isFinite(amount) ? amount : 1;
    part(row, ".unit").value = said[2] || "";
    fit(row);
  }
  // Only the units that the mode understands; none where it takes no strength.
  function fit(row) {
    const known = takes(row), unit = part(row, ".unit");
    part(row, ".strength").hidden = part(row, ".dose").hidden = !known.length;
    for (const option of unit.options) option.disabled = option.hidden = !known.includes(option.value);
    if (known.length && !known.includes(unit.value)) unit.value = known.includes("xmax") ? "xmax" : "";
    const slide = part(row, ".slide");
    const share = scale(row);
    slide.hidden = share === null;
    if (share !== null) slide.value = Number(part(row, ".amount").value) / share;
    const amount = part(row, ".amount").value;
    part(row, '[name="strength"]').value = known.length && amount !== "" ? `${Number(amount)}${unit.value}` : "";
  }
  // How much of the number field one step of the slider is: absolute strengths go by the maximum.
  function scale(row) {
    const unit = part(row, ".unit").value;
    if (unit === "" && takes(row).includes("xmax")) return maximum(row);
    return unit === "" && takes(row).includes("xnorm") ? null : 1;
  }
  edits.addEventListener("input", (event) => {
    const row = event.target.closest(".edit");
    if (!row) return;
    if (event.target.matches(".slide")) part(row, ".amount").value = +(Number(event.target.value) * (scale(row) || 1)).toPrecision(4);
    if (event.target.matches(".slide, .amount, .unit, [name='mode']")) fit(row);
    address();
  });
  edits.addEventListener("click", (event) => {
    const row = event.target.closest(".edit");
    if (!row) return;
    if (event.target.matches(".remove")) { row.remove(); byId("q").focus(); changed(); }
    if (event.target.matches(".dose")) dose(row);
  });

  // ---- the address ---------------------------------------------------------------------------
  const query = () => new URLSearchParams(new FormData(form)).toString();
  function address() {
    const asked = query();
    history.replaceState(null, "", `/steer?${asked}`);
    byId("permalink").href = `/steer?${asked}`;
    byId("twin").href = `/api/steer?${asked}`;
  }
  function changed() {
    const n = edits.querySelectorAll(".edit").length;
    byId("none").hidden = n > 0;
    go.disabled = n === 0 || running !== null;
    address();
  }
  form.addEventListener("input", (event) => { if (!event.target.closest(".edit")) address(); });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(go); }
  });
  document.addEventListener("htmx:beforeRequest", (event) => {
    const full = edits.querySelectorAll(".edit").length >= Number(form.dataset.most);
    if (event.detail.target === edits && full) { event.preventDefault(); byId("none").hidden = false; }
  });
  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.detail.target !== edits) return;
    const row = edits.querySelector(".edit:last-of-type");
    if (row) read(row);
    changed();
  });

  // ---- generating ----------------------------------------------------------------------------
  function fail(sentence) { wrong.textContent = sentence; wrong.hidden = false; }
  function begin(box) { box.replaceChildren(text("span", byId("prompt").value, "given")); const made = text("span", ""); box.append(made); return made; }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running || go.disabled) return;
    const own = running = new AbortController();
    wrong.hidden = true; go.disabled = true; stop.disabled = false;
    const into = { baseline: begin(byId("baseline")), steered: begin(byId("steered")) };
    byId("pair").setAttribute("aria-busy", "true");
    state.textContent = state.dataset.waiting;
    address();
    try {
      await gemscope.stream(`/api/steer?${query()}`, (piece) => {
        if (piece.error) { fail(piece.error); return; }
        if (piece.done) {
          into.baseline.textContent = piece.done.baseline[0]; into.steered.textContent = piece.done.steered[0];
          state.textContent = state.dataset.done;
          return;
        }
        into[piece.what].textContent += piece.text;
        state.textContent = state.dataset[piece.what];
      }, own.signal);
    } catch (error) {
      if (own.signal.aborted) state.textContent = state.dataset.stopped;
      else { fail(error.message); state.textContent = ""; }
    }
    if (!wrong.hidden) state.textContent = "";
    byId("pair").removeAttribute("aria-busy");
    running = null; stop.disabled = true;
    changed();
  });
  stop.addEventListener("click", () => { if (running) running.abort(); });

  // ---- dose and response ---------------------------------------------------------------------
  const panel = byId("dose");
  async function dose(row) {
    if (measuring) measuring.abort();
    const own = measuring = new AbortController();
    const known = takes(row);
    const many = known.includes("xmax") ? [0.25, 0.5, 1, 1.5, 2, 3, 4].map((s) => `${s}xmax`)
      : known.includes("xnorm") ? ["1", "2", "4", "8", "16", "32"] : ["-2", "-1", "0", "0.5", "2", "4"];
    const asked = new URLSearchParams({ feature: part(row, '[name="feature"]').value, mode: part(row, '[name="mode"]').value, positions: part(row, '[name="positions"]').value, strengths: many.join(","), seed: form.elements.seed.value });
    panel.hidden = false; clear();
    byId("dose-name").textContent = part(row, "legend").textContent;
    byId("dose-said").textContent = panel.dataset.busy; byId("dose-said").className = "small soft";
    panel.scrollIntoView({ block: "nearest" });
    try {
      const answer = await fetch(`/api/dose?${asked}`, { signal: own.signal });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.detail);
      shown = found; draw();
    } catch (error) {
      if (own.signal.aborted) return;
      byId("dose-said").textContent = error.message; byId("dose-said").className = "mistake";
    }
  }
  let shown = null;
  function clear() { for (const chart of charts) chart.destroy(); charts = []; byId("plots").replaceChildren(); byId("dose-table").replaceChildren(); shown = null; }
  document.addEventListener("gemscope:theme", () => { if (shown) { const kept = shown; clear(); shown = kept; draw(); } });

  function draw() {
    const found = shown, said = byId("dose-said");
    for (const chart of charts) chart.destroy();
    charts = []; byId("plots").replaceChildren();
    const tokens = found.promoted ? ` ${panel.dataset.tokens}: ${found.promoted.map((t) => JSON.stringify(t)).join(" ")}.` : "";
    said.className = "small"; said.textContent = `${found.reason}.${tokens}`;
    const sizes = found.sizes || found.points.map((_, i) => i + 1);
    const order = sizes.map((_, i) => i).sort((a, b) => sizes[a] - sizes[b]);
    const relative = found.points.every((p) => /xmax$/.test(p.strength) || Number(p.strength) === 0);
    const label = relative && found.maximum ? panel.dataset.strength.replace("{max}", found.maximum.toPrecision(3)) : panel.dataset.plain;
    const knee = found.points.findIndex((p) => p.strength === found.knee);
    const names = [found.effect, "perplexity", "repetition"];
    // All places first: each is as wide as its column.
    const boxes = names.map((name) => { const box = document.createElement("div"); box.append(text("h3", panel.dataset[name])); return box; });
    byId("plots").append(...boxes);
    names.forEach((name, i) => plot(boxes[i], name, found, order, sizes, label, knee < 0 ? null : sizes[knee]));
    table(found, order);
  }
  function plot(box, name, found, order, sizes, label, knee) {
    const of = (key) => order.map((i) => found.points[i][name] && found.points[i][name][key]);
    const plain = found.baseline[name] ? found.baseline[name].value : null;
    const data = [order.map((i) => sizes[i]), of("value"), of("high"), of("low"), order.map(() => plain)];
    const ink = gemscope.colour("soft"), line = gemscope.colour("line"), main = gemscope.colour(name === found.effect ? "accent" : "cool");
    const axis = (words) => ({ label: words, labelSize: 18, labelFont: "11px system-ui", font: "11px system-ui", stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } });
    const bound = { label: panel.dataset.interval, stroke: "transparent", points: { show: false } };
    const chart = new uPlot({
      width: Math.max(240, box.clientWidth), height: 210, scales: { x: { time: false } },
      axes: [axis(label), { ...axis(""), size: 54, labelSize: 4 }],
      series: [{ label: panel.dataset.plain }, { label: name, stroke: main, width: 2, points: { size: 6, fill: main } }, bound, bound,
        { label: panel.dataset.unsteered, stroke: ink, dash: [5, 4], width: 1.5, points: { show: false } }],
      bands: [{ series: [2, 3], fill: `color-mix(in srgb, ${main} 18%, transparent)` }],
      legend: { show: false }, cursor: { drag: { x: false, y: false } },
      hooks: { draw: [(u) => {
        if (knee === null) return;
        const x = Math.round(u.valToPos(knee, "x", true));
        u.ctx.save(); u.ctx.strokeStyle = ink; u.ctx.setLineDash([2, 3]); u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top); u.ctx.lineTo(x, u.bbox.top + u.bbox.height); u.ctx.stroke();
        u.ctx.textAlign = "left"; u.ctx.fillStyle = ink; u.ctx.font = `${11 * devicePixelRatio}px system-ui`; u.ctx.fillText(panel.dataset.knee, x + 4, u.bbox.top + 12 * devicePixelRatio); u.ctx.restore();
      }] },
    }, data, box);
    charts.push(chart);
  }
  function table(found, order) {
    const head = document.createElement("tr"), into = byId("dose-table");
    const names = [found.effect, "kl", "perplexity", "repetition"];
    for (const words of [panel.dataset.plain, ...names.map((n) => panel.dataset[n]), panel.dataset.text]) { const th = text("th", words); th.scope = "col"; head.append(th); }
    const rows = [found.baseline, ...order.map((i) => found.points[i])].map((point) => {
      const row = document.createElement("tr");
      row.append(text("td", point.strength === null ? panel.dataset.unsteered : point.strength));
      if (point.strength !== null && point.strength === found.knee) { row.className = "knee"; row.firstChild.append(` · ${panel.dataset.knee}`); }
      for (const name of names) row.append(text("td", point[name] ? Number(point[name].value).toPrecision(3) : "–", "n"));
      const cut = text("td", found.prompts[0] + point.continuations[0], "cut mono"); cut.title = cut.textContent; row.append(cut);
      return row;
    });
    into.replaceChildren(head, ...rows);
  }

  for (const row of edits.querySelectorAll(".edit")) read(row);
  byId("permalink").href = `/steer?${query()}`; byId("twin").href = `/api/steer?${query()}`;
  go.disabled = !edits.querySelector(".edit");
})();
