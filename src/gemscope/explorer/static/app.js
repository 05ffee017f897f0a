"use strict";
// What every page has: theme, keys, the token of writes, mistakes told in place, streams.
const gemscope = (() => {
  const root = document.documentElement;
  const saved = localStorage.getItem("theme");
  if (saved) root.dataset.theme = saved;
  const token = document.querySelector('meta[name="gemscope-token"]').content;

  function themeNow() {
    return root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = themeNow() === "dark" ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    document.dispatchEvent(new CustomEvent("gemscope:theme"));
  });
  const keys = document.getElementById("keys");
  document.getElementById("help").addEventListener("click", () => keys.showModal());

  // Pages say with data-key which element a key is for: a link is followed, a field focused.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
    if (typing && event.key !== "Escape") return;
    if (event.key === "Escape" && typing) { event.target.blur(); return; }
    if (keys.open) return;
    if (event.key === "?") { keys.showModal(); event.preventDefault(); return; }
    const found = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (!found) return;
    event.preventDefault();
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(found.tagName)) { found.focus(); found.select && found.select(); } else found.click();
  });

  document.addEventListener("htmx:configRequest", (event) => { event.detail.headers["X-Gemscope"] = token; });
  // A mistake comes with its status and its sentence: it is shown where the answer would be.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.xhr.status >= 400) { event.detail.shouldSwap = true; event.detail.isError = false; }
  });
  document.addEventListener("htmx:sendError", (event) => {
    const p = document.createElement("p");
    p.className = "mistake"; p.setAttribute("role", "alert");
    p.textContent = "The server does not answer; is gemscope serve still running?";
    event.detail.target.replaceChildren(p);
  });

  async function post(url, body, method = "POST") {
    const answer = await fetch(url, { method, headers: { "Content-Type": "application/json", "X-Gemscope": token }, body: JSON.stringify(body) });
    const said = await answer.json().catch(() => ({ detail: answer.statusText }));
    if (!answer.ok) throw new Error(said.detail);
    return said;
  }
  // One JSON value a line, as it comes; aborting the signal stops the work on the server.
  async function stream(url, heard, signal) {
    const answer = await fetch(url, { signal });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({ detail: answer.statusText }))).detail);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      held += value || "";
      const lines = held.split("\n");
      held = lines.pop();
      for (const line of lines) if (line) heard(JSON.parse(line));
      if (done) return;
    }
  }
  function colour(name) { return getComputedStyle(root).getPropertyValue(`--${name}`).trim(); }
  return { post, stream, colour, themeNow };
})();
