"use strict";
// A graph on two canvases: what is shown, where it stands, how it is drawn. Edges and nodes that
// stay lie on one, what changes with the pointer on the other.
const graphPlot = (() => {
  const LEFT = 58, TOP = 82, FOOT = 30, TAU = 2 * Math.PI;
  const CONSTANT = new Set(["bos", "bias"]);

  // Columns of the file as arrays, sums of what comes in, and what belongs to what.
  function read(data) {
    const n = data.nodes.length, { source, target, weight } = data.edges;
    const comes = new Float64Array(n), into = data.nodes.map(() => []), from = data.nodes.map(() => []);
    const constant = data.nodes.map((one) => CONSTANT.has(one.kind));
    for (let e = 0; e < weight.length; e++) {
      into[target[e]].push(e); from[source[e]].push(e);
      if (!constant[source[e]]) comes[target[e]] += Math.abs(weight[e]);
    }
    const score = Float64Array.from(weight, (w, e) => (Math.abs(w) / (comes[target[e]] || 1)) * data.nodes[target[e]].influence);
    const place = new Map(data.nodes.map((one, i) => [one.id, i]));
    const layers = data.dictionaries.length;
    // Share of all influence that a node and those above it have: what the slider goes by.
    const free = [...data.nodes.keys()].filter((i) => data.nodes[i].kind === "feature" || data.nodes[i].kind === "error");
    free.sort((a, b) => data.nodes[b].influence - data.nodes[a].influence);
    const share = new Float64Array(n), all = free.reduce((sum, i) => sum + data.nodes[i].influence, 0) || 1;
    let sum = 0;
    for (const i of free) { share[i] = sum / all; sum += data.nodes[i].influence; }
    return { ...data, n, source, target, weight, comes, into, from, constant, score, place, layers, share };
  }

  function plot(box, graph, heard) {
    const plane = box.querySelector(".plane"), base = box.querySelector(".base"), over = box.querySelector(".over");
    const rows = graph.layers + 2, state = { keep: 1, edges: 600, constants: false, only: null, pins: new Set(), marks: new Set(), groups: [], open: new Set(), path: null, zoom: 1, chosen: -1, found: null, alike: null };
    let units = [], unitOf = [], shown = [], links = [], hovered = -1, wide = 0, tall = 0, step = 10, rowY = [], columns = [];
    const rowOf = (one) => one.kind === "embedding" ? 0 : one.kind === "target" ? rows - 1 : 1 + (one.layer || 0);

    // ---- what is shown -------------------------------------------------------------------------
    function build() {
      const inside = new Map();
      graph.groups.length = 0; graph.groups.push(...state.groups);
      units = graph.nodes.map((one, i) => ({ i, node: one, kind: one.kind, label: one.label, influence: one.influence, members: [i], row: rowOf(one), column: one.kind === "bias" ? -1 : one.position === null || one.position === undefined ? graph.tokens.length - 1 : one.position }));
      state.groups.forEach((group, g) => {
        const members = group.ids.map((id) => graph.place.get(id)).filter((i) => i !== undefined);
        if (state.open.has(g) || members.length < 1) return;
        const first = members.reduce((a, b) => graph.nodes[b].influence > graph.nodes[a].influence ? b : a);
        const mid = [...members].sort((a, b) => units[a].row - units[b].row)[members.length >> 1];
        const at = units.length;
        units.push({ i: at, group: g, kind: "group", label: group.label, influence: members.reduce((s, i) => s + graph.nodes[i].influence, 0), members, row: units[mid].row, column: units[first].column });
        for (const i of members) inside.set(i, at);
      });
      unitOf = graph.nodes.map((_, i) => inside.has(i) ? inside.get(i) : i);
      const wanted = (u) => {
        if (u.kind === "group") return !state.path || u.members.some((i) => state.path.has(i));
        if (inside.has(u.i)) return false;
        if (graph.constant[u.i] && !state.constants) return false;
        if (state.path && !state.path.has(u.i)) return false;
        if (u.kind === "embedding" || u.kind === "target" || state.pins.has(u.node.id) || state.path) return true;
        if (state.only) return false;
        return graph.constant[u.i] || graph.share[u.i] <= state.keep - 1e-9 || u.i === state.chosen;
      };
      for (const u of units) u.on = wanted(u);
      shown = units.filter((u) => u.on);
      const sums = new Map(), n = units.length;
      for (let e = 0; e < graph.weight.length; e++) {
        const s = unitOf[graph.source[e]], t = unitOf[graph.target[e]];
        if (s === t || !units[s].on || !units[t].on) continue;
        const key = s * n + t, held = sums.get(key);
        if (held) { held.weight += graph.weight[e]; held.score += graph.score[e]; } else sums.set(key, { s, t, weight: graph.weight[e], score: graph.score[e] });
      }
      links = [...sums.values()].sort((a, b) => b.score - a.score);
      place(); draw(); later();
      heard.built({ nodes: shown.length, edges: Math.min(links.length, state.edges), all: links.length });
    }
    function place() {
      const cells = new Map(), room = box.clientWidth || 800, n = graph.tokens.length;
      for (const u of shown) { const key = `${u.row}/${u.column}`; if (!cells.has(key)) cells.set(key, []); cells.get(key).push(u); }
      const most = Math.max(1, ...[...cells.values()].map((c) => c.length));
      const spread = (per) => { const need = Array(n).fill(2.6); for (const c of cells.values()) if (c[0].column >= 0) need[c[0].column] = Math.max(need[c[0].column], Math.min(c.length, per) + 1.1); return need; };
      const size = Math.max(7, Math.min(14, 16 - most / 6));
      let per = Math.min(most, 24);
      while (per > 3 && spread(per).reduce((a, b) => a + b, 0) * size > room - LEFT - 12) per--;
      const need = spread(per), total = need.reduce((a, b) => a + b, 0);
      step = Math.min(20, Math.max(size, (room - LEFT - 12) / total)) * state.zoom;
      const out = cells.get(`${rows - 1}/${n - 1}`);
      // Labels of outputs lean: each needs a line's height of its own.
      if (out) need[n - 1] = Math.max(need[n - 1], (Math.min(out.length, 10) * 13) / step + 1.2);
      let x = LEFT; columns = need.map((w) => { const c = { x, w: w * step }; x += c.w; return c; });
      wide = Math.max(x + 8, room - 2);
      const lines = Array(rows).fill(1);
      for (const c of cells.values()) lines[c[0].row] = Math.max(lines[c[0].row], Math.ceil(c.length / (c[0].row === rows - 1 ? 99 : per)));
      let y = 0; const high = lines.map((k) => k * step + Math.max(22 * Math.min(state.zoom, 1.4), Math.min(64, (0.62 * innerHeight - TOP - FOOT) / rows - step)));
      tall = TOP + high.reduce((a, b) => a + b, 0) + FOOT;
      rowY = high.map((h) => { const at = tall - FOOT - y - h / 2; y += h; return at; });
      for (const c of cells.values()) {
        c.sort((a, b) => b.influence - a.influence || a.i - b.i);
        const row = c[0].row, top = row === rows - 1, many = top ? 99 : per, gap = top && c.length > 1 ? Math.max(step, 13) : step;
        const k = Math.ceil(c.length / many), column = c[0].column < 0 ? { x: LEFT - 16, w: 14 } : columns[c[0].column];
        c.forEach((u, at) => {
          const line = Math.floor(at / many), own = Math.min(many, c.length - line * many);
          u.x = column.x + column.w / 2 + ((at % many) - (own - 1) / 2) * gap;
          u.y = rowY[row] + (line - (k - 1) / 2) * step;
        });
      }
      const dots = devicePixelRatio || 1;
      for (const canvas of [base, over]) { canvas.width = wide * dots; canvas.height = tall * dots; canvas.style.width = `${wide}px`; canvas.style.height = `${tall}px`; canvas.getContext("2d").setTransform(dots, 0, 0, dots, 0, 0); }
      plane.style.width = `${wide}px`; plane.style.height = `${tall}px`;
      const span = (words, style, title) => { const s = document.createElement("span"); s.textContent = words; Object.assign(s.style, style); if (title) s.title = title; return s; };
      box.querySelector(".layers").replaceChildren(...rowY.map((at, r) => span(r === 0 ? heard.words.tokenrow : r === rows - 1 ? heard.words.out : r - 1, { top: `${at - 9}px` })));
      const tokens = box.querySelector(".tokens");
      tokens.replaceChildren(...columns.map((c, i) => span(graph.tokens[i], { left: `${c.x}px`, width: `${c.w - 2}px` }, `${i}: ${graph.tokens[i]}`)));
    }

    // ---- drawing -------------------------------------------------------------------------------
    const radius = (u) => Math.max(2, Math.min(6, step * 0.3)) * (u.kind === "group" ? 1.5 : 1) * (u.influence > 0.1 ? 1.25 : 1);
    function shape(pen, u, r) {
      pen.beginPath();
      switch (u.kind) {
        case "error": pen.moveTo(u.x, u.y - r * 1.2); pen.lineTo(u.x + r * 1.2, u.y); pen.lineTo(u.x, u.y + r * 1.2); pen.lineTo(u.x - r * 1.2, u.y); pen.closePath(); break;
        case "embedding": case "target": pen.rect(u.x - r, u.y - r, 2 * r, 2 * r); break;
        case "bos": case "bias": pen.moveTo(u.x, u.y - r); pen.lineTo(u.x + r, u.y + r); pen.lineTo(u.x - r, u.y + r); pen.closePath(); break;
        case "group": pen.roundRect(u.x - r * 1.5, u.y - r, r * 3, r * 2, r); break;
        default: pen.arc(u.x, u.y, r, 0, TAU);
      }
    }
    const curve = (a, b) => { const m = (a.y + b.y) / 2 + (Math.abs(a.y - b.y) < 2 ? 24 : 0); return [a.x, m, b.x, m, b.x, b.y]; };
    // Few paths for many edges: by sign, and by how strong they are.
    function edges(pen, some, faint) {
      const most = some.length ? Math.max(...some.slice(0, 40).map((l) => l.score)) || 1 : 1, parts = new Map();
      for (const l of some) {
        const part = Math.min(4, Math.floor(5 * Math.sqrt(l.score / most))), key = `${l.weight < 0 ? "cool" : "accent"}${part}`;
        if (!parts.has(key)) parts.set(key, []);
        parts.get(key).push(l);
      }
      for (const [key, own] of [...parts].sort((a, b) => a[0].slice(-1) - b[0].slice(-1))) {
        const part = Number(key.slice(-1));
        pen.strokeStyle = gemscope.colour(key.slice(0, -1)); pen.lineWidth = 0.6 + part * 0.7; pen.globalAlpha = (faint || 1) * (0.14 + part * 0.15);
        pen.beginPath();
        for (const l of own) { const a = units[l.s], b = units[l.t]; pen.moveTo(a.x, a.y); pen.bezierCurveTo(...curve(a, b)); }
        pen.stroke();
      }
      pen.globalAlpha = 1;
    }
    function draw() {
      const pen = base.getContext("2d"), ink = gemscope.colour("ink"), soft = gemscope.colour("soft"), line = gemscope.colour("line");
      pen.clearRect(0, 0, wide, tall);
      pen.strokeStyle = line; pen.lineWidth = 1; pen.globalAlpha = 0.7; pen.beginPath();
      columns.forEach((c) => { pen.moveTo(c.x, TOP - 6); pen.lineTo(c.x, tall - FOOT); });
      pen.stroke(); pen.globalAlpha = 1;
      edges(pen, links.slice(0, state.edges), state.chosen >= 0 && !state.path ? 0.3 : 1);
      for (const u of shown) {
        shape(pen, u, radius(u));
        pen.fillStyle = u.kind === "group" ? gemscope.colour("panel") : soft; pen.fill();
        pen.strokeStyle = gemscope.colour("page"); pen.lineWidth = 1;
        if (u.kind === "group") pen.strokeStyle = ink;
        const weak = u.node && heard.stability(u.node.id) < 0.5;
        if (weak) { pen.strokeStyle = ink; pen.setLineDash([2, 2]); }
        pen.stroke(); pen.setLineDash([]);
      }
      pen.font = "11px system-ui, sans-serif"; pen.fillStyle = ink;
      for (const u of shown) {
        if (u.kind === "target") { pen.save(); pen.translate(u.x - 2, u.y - radius(u) - 4); pen.rotate(0.9); pen.textAlign = "right"; pen.fillText(heard.outLabel(u.node), 0, 0); pen.restore(); }
        if (u.kind === "group") { pen.textAlign = "center"; pen.fillText(short(u.label, 22), u.x, u.y - radius(u) - 4); }
      }
    }
    const short = (words, n) => words.length > n ? `${words.slice(0, n - 1)}…` : words;
    let waits = false;
    function later() { if (!waits) { waits = true; requestAnimationFrame(() => { waits = false; drawOver(); }); } }
    function ring(pen, u, colour, width, dash) { pen.strokeStyle = colour; pen.lineWidth = width; pen.setLineDash(dash || []); shape(pen, u, radius(u) + 2.5); pen.stroke(); pen.setLineDash([]); }
    function drawOver() {
      const pen = over.getContext("2d"), ink = gemscope.colour("ink"), accent = gemscope.colour("accent");
      pen.clearRect(0, 0, wide, tall);
      const focus = [...new Set([state.chosen, hovered])].filter((i) => units[i] && units[i].on);
      for (const i of focus) {
        const own = links.filter((l) => l.s === i || l.t === i), some = own.slice(0, i === hovered && i !== state.chosen ? 40 : 200);
        edges(pen, some, 1.6);
        for (const l of some.slice(0, 80)) {
          const u = units[l.s === i ? l.t : l.s];
          pen.fillStyle = gemscope.colour(l.weight < 0 ? "cool" : "accent"); shape(pen, u, radius(u) + 0.5); pen.fill();
        }
      }
      for (const u of shown) {
        if (u.node && state.pins.has(u.node.id)) ring(pen, u, accent, 2);
        if (u.node && state.marks.has(u.node.id)) ring(pen, u, ink, 1.5, [3, 2]);
        if (state.found && u.members.some((i) => state.found.has(i))) ring(pen, u, accent, 1.5);
        if (state.alike && u.members.some((i) => graph.nodes[i].address === state.alike)) ring(pen, u, ink, 2);
      }
      for (const i of focus) {
        const u = units[i]; pen.fillStyle = i === state.chosen ? ink : accent; shape(pen, u, radius(u) + 1); pen.fill(); ring(pen, u, ink, 1.5);
      }
    }

    // ---- pointer -------------------------------------------------------------------------------
    function nearest(x, y, within) {
      let best = -1, least = within * within;
      for (const u of shown) { const d = (u.x - x) ** 2 + (u.y - y) ** 2; if (d < least) { least = d; best = u.i; } }
      return best;
    }
    function hover(i) { if (i === hovered) return; hovered = i; over.style.cursor = i < 0 ? "" : "pointer"; heard.hover(i < 0 ? null : units[i]); later(); }
    over.addEventListener("pointermove", (event) => hover(nearest(event.offsetX, event.offsetY, Math.max(9, step))));
    over.addEventListener("pointerleave", () => hover(-1));
    over.addEventListener("click", (event) => { const i = nearest(event.offsetX, event.offsetY, Math.max(12, step)); heard.click(i < 0 ? null : units[i]); });
    let before = 0;
    new ResizeObserver(() => { if (Math.abs(box.clientWidth - before) > 2) { before = box.clientWidth; build(); } }).observe(box);
    document.addEventListener("gemscope:theme", () => { draw(); later(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); later(); });

    function paths(i, least) {
      const found = new Set(units[i].members);
      for (const [lists, end] of [[graph.into, graph.source], [graph.from, graph.target]]) {
        const left = [...units[i].members], seen = new Set(left);
        while (left.length) for (const e of lists[left.pop()]) {
          const t = graph.target[e], k = end[e];
          if (Math.abs(graph.weight[e]) / (graph.comes[t] || 1) < least || seen.has(k) || (graph.constant[k] && !state.constants)) continue;
          seen.add(k); found.add(k); left.push(k);
        }
      }
      return found;
    }
    function show(u) {
      if (!u || !u.on) return;
      if (u.x < box.scrollLeft + LEFT || u.x > box.scrollLeft + box.clientWidth - 20) box.scrollLeft = u.x - box.clientWidth / 2;
      if (u.y < box.scrollTop || u.y > box.scrollTop + box.clientHeight - 30) box.scrollTop = u.y - box.clientHeight / 2;
    }
    function beside(i, way) {
      const u = units[i], row = shown.filter((o) => o.row === u.row).sort((a, b) => a.x - b.x || a.y - b.y);
      return row[row.indexOf(u) + way] || null;
    }
    function strongest(i, up) {
      const l = links.find((one) => (up ? one.s : one.t) === i);
      return l ? units[up ? l.t : l.s] : null;
    }
    function svg() {
      const esc = (text) => String(text).replace(/[\u0000-\u0008\u000b-\u001f\ufffe\uffff]|[\ud800-\udfff](?![\udc00-\udfff])/g, "\ufffd").replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`), f = (v) => v.toFixed(1);
      const colour = Object.fromEntries(["ink", "soft", "page", "panel", "line", "accent", "cool"].map((c) => [c, gemscope.colour(c)]));
      const out = [`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${f(wide)} ${f(tall)}" width="${f(wide)}" height="${f(tall)}" font-family="system-ui, sans-serif" font-size="11"><title>${esc(graph.prompt)}</title><rect width="100%" height="100%" fill="${colour.page}"/>`];
      const some = links.slice(0, state.edges), most = some.length ? some[0].score || 1 : 1;
      for (const l of [...some].reverse()) { const a = units[l.s], b = units[l.t], k = Math.sqrt(l.score / most); out.push(`<path d="M${f(a.x)} ${f(a.y)}C${curve(a, b).map(f).join(" ")}" fill="none" stroke="${l.weight < 0 ? colour.cool : colour.accent}" stroke-width="${f(0.6 + 2.8 * k)}" stroke-opacity="${f(0.15 + 0.6 * k)}"/>`); }
      for (const u of shown) {
        const r = radius(u), title = `<title>${esc(u.label)}</title>`, style = `fill="${u.kind === "group" ? colour.panel : colour.soft}" stroke="${u.kind === "group" || (u.node && state.pins.has(u.node.id)) ? colour.ink : colour.page}"`;
        if (u.kind === "feature") out.push(`<circle cx="${f(u.x)}" cy="${f(u.y)}" r="${f(r)}" ${style}>${title}</circle>`);
        else { const w = u.kind === "group" ? 1.5 * r : r, turn = u.kind === "error" ? ` transform="rotate(45 ${f(u.x)} ${f(u.y)})"` : ""; out.push(`<rect x="${f(u.x - w)}" y="${f(u.y - r)}" width="${f(2 * w)}" height="${f(2 * r)}"${u.kind === "group" ? ` rx="${f(r)}"` : ""}${turn} ${style}>${title}</rect>`); }
        if (u.kind === "target") out.push(`<text transform="translate(${f(u.x - 2)} ${f(u.y - r - 4)}) rotate(52)" text-anchor="end" fill="${colour.ink}">${esc(heard.outLabel(u.node))}</text>`);
        if (u.kind === "group") out.push(`<text x="${f(u.x)}" y="${f(u.y - r - 4)}" text-anchor="middle" fill="${colour.ink}">${esc(short(u.label, 22))}</text>`);
      }
      rowY.forEach((y, r) => out.push(`<text x="6" y="${f(y + 4)}" fill="${colour.soft}">${esc(r === 0 ? heard.words.tokenrow : r === rows - 1 ? heard.words.out : r - 1)}</text>`));
      columns.forEach((c, i) => out.push(`<text x="${f(c.x + c.w / 2)}" y="${f(tall - 10)}" text-anchor="middle" fill="${colour.ink}">${esc(short(graph.tokens[i], Math.max(2, Math.floor(c.w / 6.5))))}</text>`));
      return `${out.join("")}</svg>`;
    }
    return { state, build, draw: () => { draw(); later(); }, later, over, show, beside, strongest, paths, svg, unit: (i) => units[i], unitOf: (i) => units[unitOf[i]], get shown() { return shown; }, size: () => [wide, tall] };
  }
  return { read, plot };
})();
