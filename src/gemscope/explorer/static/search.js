"use strict";
// Arrow keys go through the results; the field says what the chosen kind of search takes.
(() => {
  const field = document.getElementById("q");
  const hits = () => [...document.querySelectorAll("#results a.hit")];

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const all = hits(), at = all.findIndex((a) => a.closest("li").contains(event.target));
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    // In other fields arrows have a meaning of their own.
    if (!all.length || (typing && event.target !== field)) return;
    event.preventDefault();
    if (at < 0) { if (step > 0) all[0].focus(); return; }
    if (at + step < 0) { field.focus(); return; }
    (all[at + step] || all[at]).focus();
  });

  function say() {
    const kind = document.querySelector('#search input[name="kind"]:checked');
    if (kind) field.placeholder = field.dataset[kind.value];
  }
  document.getElementById("choices").addEventListener("change", say);
  say();
})();
