"use strict";
// The list of an exported site: rows that hold every word typed.
(() => {
  const find = document.getElementById("find");
  const rows = [...document.querySelectorAll("#features tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  function show() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      if (!row.hidden) left += 1;
    }
    document.getElementById("shown").textContent = words.length ? `${left} / ${rows.length}` : "";
  }
  find.addEventListener("input", show);
  show();
})();
