"use strict";
// The form that traces: how far it is, how long it takes yet, then the graph's page.
(() => {
  const form = document.getElementById("trace"), byId = (id) => document.getElementById(id), words = JSON.parse(form.dataset.words);
  const go = byId("go"), stop = byId("stop"), state = byId("state"), wrong = byId("wrong"), far = byId("far");
  let running = null;
  const fail = (sentence) => { wrong.textContent = sentence; wrong.hidden = false; state.textContent = ""; };
  function asked() {
    const at = form.elements;
    return {
      prompt: at.prompt.value, dictionaries: at.with.value.split(/[\s,]+/).filter(Boolean), targets: at.target.value.split("\n").filter((line) => line.trim()),
      node_threshold: Number(at.node_threshold.value), edge_threshold: Number(at.edge_threshold.value), max_features: Number(at.max_features.value), chat: at.chat.checked,
    };
  }
  async function trace(signal) {
    const token = document.querySelector('meta[name="gemscope-token"]').content;
    const answer = await fetch("/api/graphs", { method: "POST", headers: { "Content-Type": "application/json", "X-Gemscope": token }, body: JSON.stringify(asked()), signal });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({ detail: answer.statusText }))).detail);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "", last = null, began = {};
    for (;;) {
      const { done, value } = await reader.read();
      held += value || "";
      const lines = held.split("\n"); held = lines.pop();
      for (const line of lines) if (line) last = told(JSON.parse(line), began) || last;
      if (done) return last;
    }
  }
  function told(piece, began) {
    if (piece.error) throw new Error(piece.error);
    if (piece.planned) { state.title = piece.planned; state.textContent = piece.planned; return null; }
    if (piece.done && piece.done.name) return piece.done;
    if (piece.what === "model") { state.textContent = words.model; return null; }
    began[piece.what] = began[piece.what] || performance.now();
    far.hidden = !piece.of; far.value = piece.of ? piece.done / piece.of : 0;
    const spent = (performance.now() - began[piece.what]) / 1000, left = piece.done ? (spent * (piece.of - piece.done)) / piece.done : 0;
    state.textContent = `${piece.what} ${piece.done}/${piece.of}${spent > 1 && left > 1 ? ` · ${words.left.replace("{n}", Math.ceil(left))}` : ""}`;
    return null;
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    const own = running = new AbortController();
    wrong.hidden = true; go.disabled = true; stop.disabled = false; state.textContent = words.waiting;
    try {
      const found = await trace(own.signal);
      if (found) { state.textContent = words.done.replace("{nodes}", found.nodes).replace("{edges}", found.edges); location.href = `/graph/${encodeURIComponent(found.name)}`; }
    } catch (error) {
      if (own.signal.aborted) state.textContent = words.stopped; else fail(error.message);
    }
    far.hidden = true; running = null; go.disabled = false; stop.disabled = true;
  });
  stop.addEventListener("click", () => { if (running) running.abort(); });
  byId("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(go); } });
})();
