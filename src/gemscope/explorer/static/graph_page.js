"use strict";
// The page of a graph: its plot, the chosen node, pins and groups, and the address that says it all.
(() => {
  const root = document.getElementById("graph"), byId = (id) => document.getElementById(id), words = JSON.parse(root.dataset.words), api = root.dataset.api;
  const say = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const number = (x) => x === null || x === undefined ? "–" : Math.abs(x) >= 1000 || (x && Math.abs(x) < 0.001) ? x.toExponential(2) : x.toPrecision(3);
  const percent = (x) => `${(100 * x).toFixed(x && Math.abs(x) < 0.1 ? 1 : 0)}%`;
  const el = (tag, text, name) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (name) e.className = name; return e; };
  const button = (text, done, key) => { const b = el("button", text); b.type = "button"; if (key) { b.dataset.key = key; b.title = key; } b.addEventListener("click", done); return b; };
  const wrong = byId("wrong"), fail = (error) => { wrong.textContent = error.message; wrong.hidden = false; };
  const get = async (url) => { const answer = await fetch(url); const said = await answer.json(); if (!answer.ok) throw new Error(said.detail); return said; };

  function begin(graph, other) {
    const returns = new Map(), keys = new Map(), checks = new Map(), checked = new Map(), edgeReturns = new Map();
    for (const one of (graph.stability || {}).nodes || []) if (one.id) { returns.set(one.id, one); keys.set(one.key, one.id); }
    for (const one of (graph.stability || {}).edges || []) edgeReturns.set(`${keys.get(one.source)} ${keys.get(one.target)}`, one);
    for (const one of (graph.checked || {}).edges || []) checks.set(`${one.source} ${one.target}`, one);
    // A node is checked on every target: the one it matters most for is shown.
    for (const one of (graph.checked || {}).nodes || []) { const old = checked.get(one.id); if (!old || Math.abs(one.frozen) > Math.abs(old.frozen)) checked.set(one.id, one); }
    const heard = { words, stability: (id) => returns.has(id) ? returns.get(id).share : 1, outLabel: (node) => { const t = graph.targets.find((one) => one.id === node.id); return t && t.probability !== null ? `${node.label} ${percent(t.probability)}` : node.label; }, built, hover, click };
    const plot = graphPlot.plot(byId("plot"), graph, heard), state = plot.state;
    const twin = other && graphPlot.plot(byId("plot-other"), other, { ...heard, stability: () => 1, outLabel: (node) => node.label, built() {}, hover: (u) => { tip(u, other); mirror(plot, u); }, click: (u) => { if (u && u.node && u.node.address) { const i = graph.nodes.findIndex((o) => o.address === u.node.address); if (i >= 0) choose(plot.unitOf(i)); } } });
    const levels = (value) => Math.max(10, Math.round(10 * (Math.max(graph.weight.length, 11) / 10) ** (value / 100)));
    const place = (node, of = graph) => /^(embedding|target)$/.test(node.kind) ? "" : [node.layer === null ? "" : say(words.layer, { n: node.layer }), node.position === null ? "" : of.tokens[node.position]].filter(Boolean).join(" · ");

    // ---- address -------------------------------------------------------------------------------
    const query = new URLSearchParams(location.search), many = (name) => (query.get(name) || "").split(",").filter(Boolean);
    state.groups = graph.groups.map((g) => ({ label: g.label, ids: [...g.ids] }));
    state.pins = new Set((query.has("pins") ? many("pins") : graph.pinned).filter((id) => graph.place.has(id)));
    state.open = new Set(many("open").map(Number).filter((g) => state.groups[g]));
    const asked = (name, other_, low, high) => { const v = Number(query.get(name)); return query.has(name) && v >= low && v <= high ? v : other_; };
    state.keep = asked("nodes", 1, 0.2, 1); state.constants = query.get("const") === "1"; state.only = query.get("only") === "1"; state.zoom = asked("zoom", 1, 0.4, 4);
    byId("nodes").value = state.keep; byId("const").checked = state.constants; byId("only").checked = state.only; byId("iso").value = asked("paths", 0.02, 0, 0.3);
    byId("edges").value = asked("edges", 100 * Math.log(Math.min(600, graph.weight.length) / 10) / Math.log(Math.max(graph.weight.length, 11) / 10), 0, 100);
    let isolated = query.has("paths");
    function address() {
      const at = new URLSearchParams(), u = plot.unit(state.chosen);
      if (query.get("with")) at.set("with", query.get("with"));
      if (query.get("lang")) at.set("lang", query.get("lang"));
      if (u) at.set("node", u.node ? u.node.id : `group.${u.group}`);
      if (state.pins.size || graph.pinned.length) at.set("pins", [...state.pins].join(","));
      if (state.keep < 1) at.set("nodes", state.keep);
      at.set("edges", byId("edges").value);
      if (state.open.size) at.set("open", [...state.open].join(","));
      if (state.constants) at.set("const", "1");
      if (state.only) at.set("only", "1");
      if (isolated) at.set("paths", byId("iso").value);
      if (state.zoom !== 1) at.set("zoom", state.zoom.toFixed(2));
      const url = `${root.dataset.url}?${at}`;
      history.replaceState(null, "", url); byId("permalink").href = url;
    }
    function built(n) { byId("shown").textContent = say(words.shown, { n: n.nodes, m: graph.n, e: n.edges, f: graph.weight.length }); }
    function refresh() {
      state.edges = levels(Number(byId("edges").value));
      state.path = isolated && plot.unit(state.chosen) ? plot.paths(state.chosen, Number(byId("iso").value)) : null;
      byId("nodes-n").textContent = percent(state.keep); byId("edges-n").textContent = state.edges.toLocaleString(); byId("iso-n").textContent = percent(Number(byId("iso").value));
      byId("iso-row").hidden = !isolated;
      plot.build(); address();
    }
    let waits = false;
    const soon = () => { if (!waits) { waits = true; requestAnimationFrame(() => { waits = false; refresh(); }); } };
    byId("nodes").addEventListener("input", (event) => { state.keep = Number(event.target.value); soon(); });
    for (const id of ["edges", "iso"]) byId(id).addEventListener("input", soon);
    byId("const").addEventListener("change", (event) => { state.constants = event.target.checked; refresh(); });
    byId("only").addEventListener("change", (event) => { state.only = event.target.checked; refresh(); });
    const zoom = (by) => { state.zoom = Math.min(4, Math.max(0.4, state.zoom * by)); refresh(); };
    byId("less").addEventListener("click", () => zoom(1 / 1.25)); byId("more").addEventListener("click", () => zoom(1.25));
    root.addEventListener("click", (event) => { const b = event.target.closest("[data-max]"); if (b) { byId(b.dataset.max).classList.toggle("whole"); document.body.classList.toggle("held", !!document.querySelector(".pane.whole")); } });

    // ---- hovering ------------------------------------------------------------------------------
    const box = byId("tip");
    let pointer = [0, 0];
    document.addEventListener("pointermove", (event) => { pointer = [event.clientX, event.clientY]; });
    function tip(u, of) {
      box.hidden = !u; if (!u) return;
      const said = u.node ? [words[u.kind], place(u.node, of), u.kind === "feature" ? `${words.activation} ${number(u.node.activation)}` : "", `${words.influence} ${number(u.influence)}`] : [words.group, say(words.members, { n: u.members.length })];
      if (u.node && returns.has(u.node.id) && of === graph) said.push(say(words.returns, { n: percent(returns.get(u.node.id).share) }));
      box.replaceChildren(el("b", u.label), el("span", said.filter(Boolean).join(" · "), "soft"));
      box.style.left = `${Math.min(pointer[0] + 14, innerWidth - box.offsetWidth - 8)}px`;
      box.style.top = `${pointer[1] + 20 + box.offsetHeight > innerHeight ? pointer[1] - box.offsetHeight - 12 : pointer[1] + 16}px`;
    }
    function mirror(where, u) { if (!where) return; where.state.alike = u && u.node ? u.node.address : null; where.later(); }
    function hover(u) { tip(u, graph); mirror(twin, u); }

    // ---- the chosen node -----------------------------------------------------------------------
    let holding = false, during = 0;
    function click(u) {
      if (holding) { if (u) { for (const i of u.members) toggle(state.marks, graph.nodes[i].id); during++; plot.later(); node(); } return; }
      choose(u);
      plot.over.focus({ preventScroll: true });
    }
    function toggle(set, id) { if (!set.delete(id)) set.add(id); }
    function choose(u) {
      const was = state.path;
      state.chosen = u ? u.i : -1;
      if (!u) isolated = false;
      if (was || isolated || (u && !u.on)) refresh(); else { plot.draw(); address(); }
      if (u) { plot.show(plot.unit(u.i)); byId("said").textContent = `${u.label}, ${u.node ? `${words[u.kind]}, ${place(u.node)}` : words.group}`; }
      node(); card();
    }
    // All that comes in or goes out of a unit, by the unit at the other end, whatever sliders hide.
    function ends(u, inward) {
      const inside = new Set(u.members), sums = new Map();
      let between = 0;
      for (const i of u.members) for (const e of (inward ? graph.into : graph.from)[i]) {
        const k = inward ? graph.source[e] : graph.target[e];
        if (inside.has(k)) { between += graph.weight[e]; continue; }
        const at = plot.unitOf(k), held = sums.get(at.i) || { u: at, weight: 0, of: 0 };
        held.weight += graph.weight[e]; sums.set(at.i, held);
      }
      return { rows: [...sums.values()].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)), between };
    }
    const value = (u) => u.members.reduce((s, i) => graph.nodes[i].value === null ? s : (s || 0) + graph.nodes[i].value, null);
    const rest = (u) => u.members.reduce((s, i) => s + (graph.nodes[i].remainder || 0), 0);
    function row(said, weight, whole, most, u, extra) {
      const tr = el("tr"), name = el("td"), bar = el("td", undefined, "bar"), fill = el("i", undefined, weight < 0 ? "down" : "up");
      if (u) { const b = button(said, () => choose(u)); b.className = "plain"; b.title = said; name.append(b, el("span", ` ${u.node ? `${u.kind === "feature" ? "" : words[u.kind]} ${place(u.node)}` : words.group}`, "soft")); } else name.append(el("span", said, "soft"));
      if (extra) { const s = el("span", ` ${extra}`, "soft check"); name.append(s); }
      fill.style.width = `${Math.min(100, 100 * Math.abs(weight) / (most || 1))}%`; bar.append(fill);
      tr.append(name, bar, el("td", number(weight), "n"), el("td", whole ? percent(weight / whole) : "", "n soft"));
      return tr;
    }
    function extra(s, t) {
      if (!s.node || !t.node) return "";
      const key = `${s.node.id} ${t.node.id}`, c = checks.get(key), r = edgeReturns.get(key);
      return [c ? say(words.checked, { a: number(c.predicted), b: number(c.frozen), c: number(c.model) }) : "", r ? say(words.returns, { n: percent(r.share) }) : ""].filter(Boolean).join(" · ");
    }
    function table(u, inward, every) {
      const found = ends(u, inward), whole = inward ? value(u) : null, part = el("section"), t = el("table", undefined, "flow"), show = every ? found.rows.length : 12;
      part.append(el("h3", `${inward ? words.inputs : words.outputs} (${found.rows.length})`));
      if (!found.rows.length) { part.append(el("p", inward ? words.none : words.out0, "soft small")); return part; }
      const left = found.rows.slice(show), most = Math.max(Math.abs(found.rows[0].weight), inward ? Math.abs(rest(u)) : 0);
      for (const one of found.rows.slice(0, show)) t.append(row(one.u.label, one.weight, inward ? whole : value(one.u), most, one.u, inward ? extra(one.u, u) : extra(u, one.u)));
      if (left.length) {
        const tr = row(say(words.more, { n: left.length }), left.reduce((s, o) => s + o.weight, 0), whole, most);
        const b = button(say(words.all, { n: found.rows.length }), () => part.replaceWith(table(u, inward, true))); b.className = "plain"; tr.firstChild.append(" ", b);
        if (!inward) tr.lastChild.textContent = tr.children[2].textContent = "";
        t.append(tr);
      }
      if (inward && whole !== null) {
        if (found.between) t.append(row(words.between, found.between, whole, most));
        t.append(row(words.rest, rest(u), whole, most));
        const tr = el("tr", undefined, "sum"); tr.append(el("td", words.sum), el("td"), el("td", number(whole), "n"), el("td", "100%", "n soft")); t.append(tr);
      }
      part.append(t);
      return part;
    }
    function node() {
      const u = plot.unit(state.chosen), into = byId("node");
      if (!u) { if (node.blank) into.replaceChildren(node.blank.cloneNode(true)); return; }
      node.blank = node.blank || into.firstElementChild.cloneNode(true);
      const head = el("h2", undefined, "label"), acts = el("div", undefined, "row small acts"), facts = [];
      head.append(el("bdi", u.label));
      const add = (...given) => acts.append(button(...given));
      if (u.node) {
        facts.push(words[u.kind], place(u.node), u.kind === "feature" ? `${words.activation} ${number(u.node.activation)}` : "", `${words.influence} ${number(u.influence)}`);
        add(`${state.pins.has(u.node.id) ? words.unpin : words.pin} (p)`, pin);
        add(`${state.marks.has(u.node.id) ? words.unmark : words.mark} (g)`, () => { toggle(state.marks, u.node.id); plot.later(); node(); });
      } else {
        facts.push(words.group, say(words.members, { n: u.members.length }), `${words.influence} ${number(u.influence)}`);
        add(words.open, () => { state.open.add(u.group); state.chosen = u.members[0]; refresh(); node(); card(); });
        add(words.dissolve, () => { state.groups.splice(u.group, 1); state.open = new Set([...state.open].filter((g) => g !== u.group).map((g) => g > u.group ? g - 1 : g)); state.chosen = u.members[0]; refresh(); node(); card(); keep(); });
      }
      const own = u.node ? state.groups.findIndex((g) => g.ids.includes(u.node.id)) : -1;
      if (own >= 0) add(`${words.close}: ${state.groups[own].label}`, () => { state.open.delete(own); refresh(); choose(plot.unitOf(u.i)); });
      if (state.marks.size > 1) add(say(words.makegroup, { n: state.marks.size }), group);
      add(`${words.rename} (r)`, rename);
      add(`${isolated ? words.whole : words.isolate} (i)`, isolate);
      const lines = [head, el("p", facts.filter(Boolean).join(" · "), "soft small"), acts];
      if (u.node && checked.has(u.node.id)) { const c = checked.get(u.node.id), t = graph.nodes.find((one) => one.id === c.target); lines.push(el("p", `→ ${t ? t.label : c.target}: ` + say(words.checked, { a: number(c.predicted), b: number(c.frozen), c: number(c.model) }), "small")); }
      if (u.node && returns.has(u.node.id)) { const r = returns.get(u.node.id); lines.push(el("p", `${say(words.returns, { n: percent(r.share) })} [${percent(r.low)}, ${percent(r.high)}]`, "small")); }
      if (!u.node) { const list = el("p", undefined, "small"); for (const i of u.members) list.append(el("span", `${graph.nodes[i].label} · ${place(graph.nodes[i])}`, "member")); lines.push(list); }
      into.replaceChildren(...lines, table(u, true), table(u, false));
    }
    const features = (u) => u ? u.members.map((i) => graph.nodes[i]).filter((o) => o.kind === "feature").map((o) => o.id) : [];
    function card() {
      const u = plot.unit(state.chosen), some = features(u);
      byId("changed").replaceChildren(); byId("card").replaceChildren();
      byId("change").hidden = !some.length || some.length > 100;
      if (u && u.node && u.kind === "feature") htmx.ajax("GET", `${root.dataset.url}/node?id=${encodeURIComponent(u.node.id)}`, { target: "#card", swap: "innerHTML" });
    }

    // ---- pins, groups, names -------------------------------------------------------------------
    let keeping = null, scoring = null;
    function keep() {
      clearTimeout(keeping);
      keeping = setTimeout(() => gemscope.post(`${api}/view`, { groups: state.groups, pinned: [...state.pins] }).then(() => { wrong.hidden = true; }, fail), 400);
    }
    function pin() {
      const u = plot.unit(state.chosen);
      if (!u) return;
      for (const i of u.members) toggle(state.pins, graph.nodes[i].id);
      refresh(); node(); pins(); keep();
    }
    function pins() {
      const into = byId("pins"), chips = [...state.pins].map((id) => {
        const one = graph.nodes[graph.place.get(id)], chip = el("span", undefined, "chip"), drop = button("×", () => { state.pins.delete(id); refresh(); node(); pins(); keep(); });
        drop.className = "plain"; drop.setAttribute("aria-label", `${words.unpin} ${one.label}`);
        const go = button(one.label, () => choose(plot.unitOf(graph.place.get(id)))); go.className = "plain";
        chip.append(go, el("span", place(one), "soft"), drop); return chip;
      });
      into.replaceChildren(...(chips.length ? chips : [el("span", words.nopins, "soft")]));
      clearTimeout(scoring); byId("pin-scores").textContent = "";
      if (!state.pins.size) return;
      const ids = [...state.pins].filter((id) => graph.nodes[graph.place.get(id)].kind === "feature");
      scoring = setTimeout(() => gemscope.post(`${api}/scores`, { ids }).then((s) => {
        byId("pin-scores").textContent = say(words.pins, { n: ids.length, a: s.part.replacement.toFixed(2), b: s.part.completeness.toFixed(2), c: s.shown.replacement.toFixed(2), d: s.shown.completeness.toFixed(2) });
      }, fail), 250);
    }
    function group() {
      const ids = [...state.marks].filter((id) => !["target", "embedding"].includes(graph.nodes[graph.place.get(id)].kind));
      if (ids.length < 2) return;
      state.groups = state.groups.map((g) => ({ ...g, ids: g.ids.filter((id) => !ids.includes(id)) }));
      const left = state.groups.map((g, i) => [g, state.open.has(i)]).filter(([g]) => g.ids.length);
      state.groups = [...left.map(([g]) => g), { label: `${words.newgroup} ${left.length + 1}`, ids }];
      state.open = new Set(left.map(([, open], i) => open ? i : -1).filter((i) => i >= 0));
      state.marks.clear(); refresh();
      choose(plot.unitOf(graph.place.get(ids[0]))); keep(); rename();
    }
    const dialog = byId("rename"), field = byId("new-name");
    function rename() {
      const u = plot.unit(state.chosen);
      if (!u || dialog.open) return;
      field.value = u.label; byId("note-row").hidden = !(u.node && u.kind === "feature" && graph.indexed.includes(u.node.address.replace(/\/\d+$/, "")));
      dialog.showModal(); field.select();
    }
    dialog.addEventListener("close", async () => {
      const u = plot.unit(state.chosen), label = field.value.trim();
      if (dialog.returnValue !== "yes" || !u) return;
      dialog.returnValue = "";
      if (!u.node) { if (label) { state.groups[u.group].label = label; refresh(); node(); keep(); } return; }
      try {
        const said = await gemscope.post(`${api}/name`, { id: u.node.id, label, note: !byId("note-row").hidden && byId("note").checked });
        u.node.label = said.label; refresh(); node(); if (said.noted) card();
      } catch (error) { fail(error); }
    });
    function isolate() { if (!plot.unit(state.chosen)) return; isolated = !isolated; refresh(); node(); }

    // ---- intervening ---------------------------------------------------------------------------
    const times = byId("times"), timesSaid = () => { byId("times-n").textContent = Number(times.value) ? `${times.value}×` : `0× (${words.ablate})`; };
    times.addEventListener("input", timesSaid); timesSaid();
    byId("intervene").addEventListener("submit", async (event) => {
      event.preventDefault();
      const into = byId("changed"); into.replaceChildren(el("p", words.running, "soft small"));
      try {
        const said = await gemscope.post(`${api}/intervene`, { ids: features(plot.unit(state.chosen)), multiple: Number(times.value) });
        const t = el("table", undefined, "tokens-table"), head = el("tr"), most = Math.max(...said.tokens.map((o) => Math.max(o.before, o.after)));
        for (const name of [words.token_, words.before, words.after]) { const th = el("th", name, name === words.token_ ? "" : "n"); th.scope = "col"; head.append(th); }
        t.append(head);
        for (const one of said.tokens) {
          const tr = el("tr"), token = el("td"); token.append(el("code", one.token, "token")); tr.append(token);
          for (const [p, tone] of [[one.before, "cool"], [one.after, "fire"]]) { const td = el("td", percent(p), `n bar-${tone}`); td.style.setProperty("--part", (p / most).toFixed(3)); tr.append(td); }
          t.append(tr);
        }
        const list = said.targets.map((one) => el("p", `${one.label}: ${say(words.expected, { a: signed(one.predicted), b: signed(one.after - one.before) })}`, "small soft"));
        into.replaceChildren(t, ...list);
      } catch (error) { into.replaceChildren(el("p", error.message, "mistake")); }
    });
    const signed = (x) => `${x < 0 ? "−" : "+"}${number(Math.abs(x))}`;

    // ---- keys, search, files -------------------------------------------------------------------
    const typing = (event) => event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || document.querySelector("dialog[open]");
    document.addEventListener("keydown", (event) => {
      if (typing(event)) return;
      const u = plot.unit(state.chosen), inPanel = event.target.closest && event.target.closest("#pane-node");
      if (/^Arrow/.test(event.key)) {
        if (inPanel) return;
        const next = !u ? plot.shown.find((o) => o.kind === "target") : event.key === "ArrowLeft" ? plot.beside(u.i, -1) : event.key === "ArrowRight" ? plot.beside(u.i, 1) : plot.strongest(u.i, event.key === "ArrowUp");
        if (!u && event.target !== plot.over && event.target !== document.body) return;
        if (next) choose(next);
        event.preventDefault();
      } else if (event.key === "p") pin();
      else if (event.key === "r") { rename(); event.preventDefault(); }
      else if (event.key === "i") isolate();
      else if (event.key === "G") group();
      else if (event.key === "g") { if (!holding) { holding = true; during = 0; } }
      else if (event.key === "Escape") {
        const large = document.querySelector(".pane.whole");
        if (large) { large.classList.remove("whole"); document.body.classList.remove("held"); } else if (isolated) isolate(); else if (state.marks.size) { state.marks.clear(); plot.later(); node(); } else choose(null);
      }
    });
    document.addEventListener("keyup", (event) => {
      if (event.key !== "g" || !holding) return;
      holding = false;
      const u = plot.unit(state.chosen);
      if (during) { if (state.marks.size > 1) group(); } else if (u && u.node) { toggle(state.marks, u.node.id); plot.later(); node(); }
    });
    addEventListener("blur", () => { holding = false; });
    byId("find").addEventListener("input", (event) => {
      const asked_ = event.target.value.trim().toLowerCase();
      state.found = asked_ ? new Set(graph.nodes.flatMap((o, i) => `${o.label} ${o.id} ${o.address || ""}`.toLowerCase().includes(asked_) ? [i] : [])) : null;
      byId("said").textContent = state.found ? say(words.found, { n: state.found.size }) : "";
      plot.later();
    });
    byId("find").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !state.found || !state.found.size) return;
      const order = [...state.found].sort((a, b) => graph.nodes[b].influence - graph.nodes[a].influence), at = order.indexOf(state.chosen);
      choose(plot.unitOf(order[(at + 1) % order.length]));
    });
    const save = (blob, kind) => { const a = el("a"); a.href = URL.createObjectURL(blob); a.download = `${root.dataset.name}.${kind}`; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 5000); };
    byId("as-svg").addEventListener("click", () => save(new Blob([plot.svg()], { type: "image/svg+xml" }), "svg"));
    byId("as-png").addEventListener("click", () => {
      const image = new Image(), [wide, tall] = plot.size();
      image.onload = () => { const c = el("canvas"); c.width = 2 * wide; c.height = 2 * tall; c.getContext("2d").drawImage(image, 0, 0, c.width, c.height); c.toBlob((blob) => save(blob, "png")); };
      image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(plot.svg())}`;
    });

    const first = query.get("node") || "", chosenGroup = /^group\.\d+$/.test(first) ? state.groups[Number(first.slice(6))] : null;
    if (twin) { twin.state.edges = 300; twin.build(); }
    const chosen = chosenGroup ? graph.place.get(chosenGroup.ids[0]) : graph.place.get(first);
    refresh();
    if (chosen !== undefined) { const paths = isolated; choose(plot.unitOf(chosen)); if (paths) refresh(); } else { isolated = false; byId("iso-row").hidden = true; }
    pins();
    root.dataset.ready = String(Math.round(performance.now()));
    window.graphView = { plot, graph };
  }
  const other = byId("pane-other");
  const columns = (url) => get(`${url}?edges=columns`).then(graphPlot.read);
  Promise.all([columns(api), other ? columns(other.dataset.api) : null]).then((found) => begin(...found)).catch(fail);
})();
