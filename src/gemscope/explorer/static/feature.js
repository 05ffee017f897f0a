"use strict";
// The page of a feature: notes are kept without leaving it, and arrows walk along a context.
(() => {
  function form() { return document.getElementById("note-form"); }
  function mistaken(text) {
    const p = form().querySelector("[role=alert]");
    p.textContent = text; p.hidden = !text;
  }

  document.addEventListener("submit", async (event) => {
    if (event.target !== form()) return;
    event.preventDefault();
    const { text, author, confidence, replaces } = form().elements;
    const body = { feature: form().dataset.feature, text: text.value, author: author.value };
    if (confidence.value !== "") body.confidence = Number(confidence.value);
    if (replaces.value) body.replaces = replaces.value;
    mistaken("");
    try {
      await gemscope.post("/api/notes", body);
    } catch (error) { mistaken(error.message); return; }
    localStorage.setItem("author", author.value);
    htmx.ajax("GET", form().dataset.notes, { target: "#notes", swap: "outerHTML" });
  });

  document.addEventListener("click", (event) => {
    const revise = event.target.closest("[data-revise]");
    if (!revise) return;
    document.getElementById("note-box").open = true;
    const fields = form().elements;
    fields.text.value = revise.dataset.text;
    fields.author.value = revise.dataset.author;
    fields.confidence.value = revise.dataset.confidence;
    fields.replaces.value = revise.dataset.revise;
    fields.text.focus();
  });

  document.addEventListener("toggle", (event) => {
    if (event.target.id !== "note-box" || !event.target.open) return;
    const author = form().elements.author;
    if (!author.value) author.value = localStorage.getItem("author") || "";
  }, true);

  // On a token the arrows go to the next one that fires; elsewhere they turn pages.
  document.addEventListener("keydown", (event) => {
    const token = event.target.closest && event.target.closest(".text .f");
    if (!token || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
    const all = [...token.closest(".text").querySelectorAll(".f")];
    const next = all[all.indexOf(token) + (event.key === "ArrowRight" ? 1 : -1)];
    event.preventDefault(); event.stopPropagation();
    if (next) next.focus();
  }, true);
})();
