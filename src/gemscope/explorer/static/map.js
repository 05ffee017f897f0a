"use strict";
// The map: every feature a dot on a canvas that moves and zooms; clusters are picked in the tree.
(() => {
  // Okabe and Ito's colours, which the colour-blind can tell apart; cividis for an amount.
  const COLOURS = { light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7B4FA3"], dark: ["#56B4E9", "#E8833A", "#2FBF94", "#E29CC4", "#F0E442", "#4C8FD6", "#B79AE0"] };
  const RAMP = [[0, 32, 77], [64, 77, 107], [124, 123, 120], [186, 174, 108], [255, 233, 69]];
  const NAMED = 24;

  function ramp(x) {
    const at = Math.max(0, Math.min(1, x)) * (RAMP.length - 1), i = Math.min(RAMP.length - 2, Math.floor(at));
    return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * (at - i)));
  }

  async function begin(box) {
    const canvas = box.querySelector("canvas"), tip = box.querySelector(".tip"), legend = box.querySelector(".legend"), loading = box.querySelector(".loading");
    const said = (name) => box.dataset[`said${name[0].toUpperCase()}${name.slice(1)}`];
    const answer = await fetch(box.dataset.url);
    const record = await answer.json();
    if (!answer.ok || answer.status === 202) {
      loading.className = "loading mistake"; loading.setAttribute("role", "alert"); loading.textContent = record.detail || record.state;
      return;
    }
    loading.remove();
    const points = record.map, n = points.length, clusters = record.clusters;
    const xs = new Float32Array(n), ys = new Float32Array(n), bin = new Uint8Array(n);
    const byFeature = new Map();
    let low = [Infinity, Infinity], high = [-Infinity, -Infinity];
    points.forEach((p, i) => {
      xs[i] = p.x; ys[i] = -p.y; byFeature.set(p.feature, i);
      low = [Math.min(low[0], xs[i]), Math.min(low[1], ys[i])]; high = [Math.max(high[0], xs[i]), Math.max(high[1], ys[i])];
    });
    const logs = points.map((p) => Math.log10(Math.max(p.density, 1e-7)));
    const least = logs.reduce((a, b) => Math.min(a, b), Infinity), most = logs.reduce((a, b) => Math.max(a, b), -Infinity);
    let by = "cluster", picked = null, hovered = -1, mark = -1, wide = 0, tall = 0, scale = 1, dx = 0, dy = 0, due = false;

    // A dot's colour is a number: 0 is grey, others are entries of the palette.
    function palette() {
      const names = COLOURS[gemscope.themeNow()];
      if (by === "cluster") return [gemscope.colour("line"), ...names];
      return [gemscope.colour("line"), ...Array.from({ length: 16 }, (_, i) => `rgb(${ramp(i / 15)})`)];
    }
    function colourAll() {
      for (let i = 0; i < n; i++) {
        const size = clusters[points[i].cluster].size;
        bin[i] = by === "cluster" ? (size < 3 ? 0 : 1 + points[i].cluster % 7) : 1 + Math.min(15, Math.floor(16 * (logs[i] - least) / Math.max(most - least, 1e-9)));
      }
    }
    function tell() {
      legend.replaceChildren();
      const add = (colour, text) => {
        const one = document.createElement("span"), dot = document.createElement("i");
        dot.style.background = colour; one.append(dot, text); legend.append(one);
      };
      const colours = palette();
      if (by === "cluster") {
        clusters.slice(0, 7).filter((c) => c.size > 2).forEach((c) => add(colours[1 + c.id % 7], c.name));
        legend.append(`${said("again")}`); add(colours[0], said("few"));
      } else {
        const bar = document.createElement("i");
        bar.className = "ramp"; bar.style.background = `linear-gradient(90deg, ${RAMP.map((c) => `rgb(${c})`)})`;
        const share = (x) => `${(100 * 10 ** x).toPrecision(2)}%`;
        legend.append(said("density"), " ", share(least), bar, `${share(most)} ${said("of")}`);
      }
    }
    function fit() {
      const pad = 26;
      scale = Math.min((wide - 2 * pad) / Math.max(high[0] - low[0], 1e-6), (tall - 2 * pad) / Math.max(high[1] - low[1], 1e-6));
      dx = wide / 2 - scale * (low[0] + high[0]) / 2; dy = tall / 2 - scale * (low[1] + high[1]) / 2;
    }
    function whole() { return Math.min((wide - 52) / Math.max(high[0] - low[0], 1e-6), (tall - 52) / Math.max(high[1] - low[1], 1e-6)); }
    function radius() { return Math.max(1.4, Math.min(7, (n > 6000 ? 1.5 : n > 1200 ? 2.3 : 3.2) * Math.sqrt(scale / whole()))); }

    function draw() {
      due = false;
      const pen = canvas.getContext("2d"), dots = devicePixelRatio || 1;
      pen.setTransform(dots, 0, 0, dots, 0, 0); pen.clearRect(0, 0, wide, tall);
      const colours = palette(), r = radius(), groups = colours.map(() => []), on = [];
      for (let i = 0; i < n; i++) {
        const x = scale * xs[i] + dx, y = scale * ys[i] + dy;
        if (x < -9 || y < -9 || x > wide + 9 || y > tall + 9) continue;
        if (picked && picked.has(points[i].cluster)) on.push(i); else groups[bin[i]].push(i);
      }
      const dot = (i, size) => {
        const x = scale * xs[i] + dx, y = scale * ys[i] + dy;
        if (size < 1.8) pen.rect(x - size, y - size, 2 * size, 2 * size); else { pen.moveTo(x + size, y); pen.arc(x, y, size, 0, 7); }
      };
      pen.globalAlpha = picked ? 0.22 : 0.9;
      groups.forEach((group, k) => { pen.fillStyle = colours[k]; pen.beginPath(); group.forEach((i) => dot(i, r)); pen.fill(); });
      pen.globalAlpha = 1;
      pen.fillStyle = gemscope.colour("accent"); pen.strokeStyle = gemscope.colour("ink"); pen.lineWidth = 1;
      if (on.length) { pen.beginPath(); on.forEach((i) => dot(i, r + 1.6)); pen.fill(); if (on.length < 400) pen.stroke(); }
      for (const i of [hovered, mark]) if (i >= 0) { pen.lineWidth = 2; pen.beginPath(); dot(i, Math.max(r + 3, 6)); pen.stroke(); }
      names(pen, colours);
    }
    const middles = clusters.filter((c) => c.size > 2).slice(0, 400).map((c) => {
      const at = c.members.map((f) => byFeature.get(f)).filter((i) => i !== undefined);
      const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
      return { id: c.id, name: c.tokens.slice(0, 2).join(" ") || c.name, x: middle(at.map((i) => xs[i])), y: middle(at.map((i) => ys[i])) };
    });
    function names(pen, colours) {
      // The largest clusters that have room; more of them the nearer one is.
      pen.font = "11px system-ui, sans-serif"; pen.textAlign = "center"; pen.lineWidth = 3; pen.lineJoin = "round"; pen.strokeStyle = gemscope.colour("page");
      const taken = []; let shown = 0;
      for (const one of middles) {
        if (shown >= NAMED * Math.min(4, scale / whole())) break;
        if (picked && !picked.has(one.id)) continue;
        const x = scale * one.x + dx, y = scale * one.y + dy - radius() - 5, half = pen.measureText(one.name).width / 2 + 4;
        if (x < half || x > wide - half || y < 12 || y > tall - 4) continue;
        if (taken.some(([a, b, h]) => Math.abs(a - x) < half + h && Math.abs(b - y) < 14)) continue;
        taken.push([x, y, half]); shown++;
        pen.strokeText(one.name, x, y);
        pen.fillStyle = by === "cluster" && !picked ? colours[1 + one.id % 7] : gemscope.colour("ink");
        pen.fillText(one.name, x, y);
      }
    }
    function later() { if (!due) { due = true; requestAnimationFrame(draw); } }

    function nearest(x, y, within) {
      let best = -1, least2 = within * within;
      for (let i = 0; i < n; i++) {
        const a = scale * xs[i] + dx - x, b = scale * ys[i] + dy - y, d = a * a + b * b;
        if (d < least2) { least2 = d; best = i; }
      }
      return best;
    }
    function hover(i) {
      if (i === hovered && !tip.hidden === i >= 0) return;
      hovered = i; canvas.classList.toggle("on-feature", i >= 0); tip.hidden = i < 0;
      if (i >= 0) {
        const p = points[i], c = clusters[p.cluster], head = document.createElement("b"), more = document.createElement("span");
        head.textContent = `${p.feature} `;
        more.textContent = `${c.size > 1 ? `${said("cluster")} ${c.name}` : said("alone")} · ${said("density")} ${(100 * p.density).toPrecision(2)}% · ${said("max")} ${p.max.toPrecision(3)}`;
        tip.replaceChildren(head, p.explanation || said("none"), more);
        const x = scale * xs[i] + dx, y = scale * ys[i] + dy;
        tip.style.left = `${Math.max(4, Math.min(x + 12, wide - tip.offsetWidth - 6))}px`;
        tip.style.top = `${y + 16 + tip.offsetHeight > tall ? Math.max(4, y - tip.offsetHeight - 12) : y + 14}px`;
      }
      later();
    }
    function zoom(by_, x = wide / 2, y = tall / 2) {
      const to = Math.max(whole() * 0.6, Math.min(whole() * 60, scale * by_)), k = to / scale;
      dx = x - k * (x - dx); dy = y - k * (y - dy); scale = to; later();
    }
    function open(i) { if (i >= 0) location.href = `${box.dataset.features}${points[i].feature}`; }
    const centred = () => hover(nearest(wide / 2, tall / 2, Math.max(wide, tall)));

    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.offsetX, event.offsetY);
    }, { passive: false });
    const held = new Map(); let moved = 0;
    canvas.addEventListener("pointerdown", (event) => { held.set(event.pointerId, [event.offsetX, event.offsetY]); moved = 0; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      const here = [event.offsetX, event.offsetY], before = held.get(event.pointerId);
      if (!before) { hover(nearest(...here, 14)); return; }
      moved += Math.abs(here[0] - before[0]) + Math.abs(here[1] - before[1]);
      const other = [...held].find(([id]) => id !== event.pointerId);
      if (other) {
        const apart = (a) => Math.hypot(a[0] - other[1][0], a[1] - other[1][1]);
        zoom(apart(here) / Math.max(apart(before), 1), (here[0] + other[1][0]) / 2, (here[1] + other[1][1]) / 2);
      } else if (moved > 4) { canvas.classList.add("dragging"); dx += here[0] - before[0]; dy += here[1] - before[1]; hover(-1); later(); }
      held.set(event.pointerId, here);
    });
    const release = (event) => { held.delete(event.pointerId); canvas.classList.remove("dragging"); };
    canvas.addEventListener("pointerup", (event) => {
      const click = held.size === 1 && moved <= 4; release(event);
      if (!click) return;
      const i = nearest(event.offsetX, event.offsetY, 14);
      // A finger has no hover: the first touch tells, the second opens.
      if (event.pointerType === "touch" && i !== mark) { mark = i; hover(i); } else open(i);
    });
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { if (!held.size) hover(-1); });
    canvas.addEventListener("dblclick", (event) => zoom(1.8, event.offsetX, event.offsetY));
    canvas.addEventListener("keydown", (event) => {
      const step = 50, move = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (move) { dx += move[0]; dy += move[1]; } else if (event.key === "+" || event.key === "=") zoom(1.4); else if (event.key === "-") zoom(1 / 1.4); else if (event.key === "0") fit(); else if (event.key === "Enter") { open(hovered); return; } else return;
      event.preventDefault(); event.stopPropagation(); centred(); later();
    });
    const done = { in: () => zoom(1.5), out: () => zoom(1 / 1.5), all: () => { fit(); later(); }, none: () => pick(null) };
    box.addEventListener("click", (event) => { const button = event.target.closest("[data-do]"); if (button) done[button.dataset.do](); });
    box.querySelector(".colour").addEventListener("change", (event) => { by = event.target.value; colourAll(); tell(); later(); });
    box.querySelector(".find").addEventListener("submit", (event) => {
      event.preventDefault();
      const i = byFeature.get(Number(event.target.feature.value)), wrong = i === undefined;
      event.target.feature.setCustomValidity(wrong ? said("missing") : "");
      if (wrong) { event.target.reportValidity(); return; }
      mark = i; scale = Math.max(scale, whole() * 3); dx = wide / 2 - scale * xs[i]; dy = tall / 2 - scale * ys[i];
      later(); hover(i);
    });
    box.querySelector(".find input").addEventListener("input", (event) => event.target.setCustomValidity(""));

    function pick(numbers, scroll) {
      picked = numbers && numbers.length ? new Set(numbers) : null;
      const key = numbers ? numbers.join(" ") : "";
      document.querySelectorAll(".pick").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.clusters === key)));
      box.querySelector('[data-do="none"]').hidden = !picked;
      const at = new URL(location.href);
      if (picked && numbers.length === 1) at.searchParams.set("cluster", key); else at.searchParams.delete("cluster");
      history.replaceState(history.state, "", at);
      if (scroll) box.scrollIntoView({ block: "nearest" });
      later();
    }
    document.querySelector(".tree").addEventListener("click", (event) => {
      const button = event.target.closest(".pick");
      if (button) pick(button.getAttribute("aria-pressed") === "true" ? null : button.dataset.clusters.split(" ").map(Number), true);
    });
    new ResizeObserver(() => {
      const dots = devicePixelRatio || 1, first = !wide;
      [wide, tall] = [canvas.clientWidth, canvas.clientHeight];
      canvas.width = wide * dots; canvas.height = tall * dots;
      if (first) fit();
      draw();
    }).observe(canvas);
    document.addEventListener("gemscope:theme", () => { tell(); later(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { tell(); later(); });
    colourAll(); tell();
    const asked = Number(box.dataset.cluster);
    if (box.dataset.cluster && clusters[asked]) pick([asked]);
    box.dataset.ready = String(n);
  }
  function find() {
    const box = document.getElementById("map");
    if (box && !box.dataset.begun) { box.dataset.begun = "1"; begin(box); }
  }
  document.addEventListener("htmx:afterSwap", find);
  find();
})();
