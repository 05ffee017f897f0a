"use strict";
// The start page: examples and sets of dictionaries fill the form, arrows move the lock.
(() => {
  const form = document.getElementById("look");
  const text = document.getElementById("text");
  const boxes = () => [...form.querySelectorAll('input[name="sae"]')];

  function count() {
    const said = document.getElementById("chosen");
    said.textContent = said.dataset.said.replace("{n}", boxes().filter((box) => box.checked).length);
  }
  // A lock is on a token of the text that was read.
  function unlock() {
    for (const radio of document.querySelectorAll('#tokens input:checked')) radio.checked = false;
  }
  text.addEventListener("input", unlock);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
  form.addEventListener("change", count);

  document.addEventListener("click", (event) => {
    const example = event.target.closest("[data-example]");
    const set = event.target.closest("[data-choose]");
    const step = event.target.closest("[data-step]");
    if (event.ctrlKey || event.metaKey || event.shiftKey || !(example || set || step)) return;
    event.preventDefault();
    if (example) { text.value = example.dataset.example; unlock(); form.requestSubmit(); }
    if (set) {
      const chosen = new Set(JSON.parse(set.dataset.choose));
      for (const box of boxes()) box.checked = chosen.has(box.value);
      count(); form.requestSubmit();
    }
    if (step) {
      unlock();
      const radio = step.dataset.step && document.getElementById(`t${step.dataset.step}`);
      if (radio) radio.checked = true;
      (radio || document.getElementById("tokens")).dispatchEvent(new Event("change", { bubbles: true }));
      if (radio) radio.closest("label").scrollIntoView({ block: "nearest" });
    }
  });
  // Of a feature and a lock the last counts, and what is empty is not in the address.
  document.addEventListener("htmx:configRequest", (event) => {
    const data = event.detail.formData;
    if (!data) return;
    for (const name of ["feature", "token"]) {
      const last = data.getAll(name).pop();
      data.delete(name);
      if (last) data.set(name, last);
    }
  });
})();
