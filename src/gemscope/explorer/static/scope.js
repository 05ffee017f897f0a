"use strict";
// The scope: cells by arrow keys, details in place, and the plots.
(() => {
  document.documentElement.classList.add("js");
  const form = document.getElementById("scope-form");
  form.addEventListener("change", () => form.submit());

  // One cell of a grid is in the order of tabs; arrows go on from it.
  const told = document.getElementById("told");
  for (const grid of document.querySelectorAll(".grid")) {
    const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.querySelector("a")));
    const cells = rows.flat().filter(Boolean);
    cells.forEach((cell, i) => { cell.tabIndex = i ? -1 : 0; });
    const say = (event) => { if (event.target.title) told.textContent = event.target.title; };
    grid.addEventListener("mouseover", say);
    grid.addEventListener("focusin", say);
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step || !event.target.matches("a")) return;
      event.preventDefault();
      let y = rows.findIndex((row) => row.includes(event.target)), x = rows[y].indexOf(event.target);
      do { y += step[0]; x += step[1]; } while (rows[y] && x < rows[y].length && x >= 0 && !rows[y][x]);
      const next = rows[y] && rows[y][x];
      if (!next) return;
      event.target.tabIndex = -1; next.tabIndex = 0; next.focus();
    });
  }

  // Colours that are told apart with any kind of sight (Okabe and Ito), and shapes beside them.
  const light = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#117799", "#882255", "#555555"];
  const dark = ["#56b4e9", "#f0a060", "#2fcf9f", "#e39ad0", "#e6d24a", "#88ccee", "#ff8fb0", "#bbbbbb"];
  const colours = () => (gemscope.themeNow() === "dark" ? dark : light);
  const figure = (v) => (v === null || v === undefined ? "" : Number(v.toPrecision(3)).toLocaleString("en"));

  function draw(place) {
    const plot = JSON.parse(place.dataset.plot), box = place.querySelector(".canvas"), at = place.querySelector(".at");
    const xs = [...new Set(plot.lines.flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
    const index = new Map(xs.map((x, i) => [x, i]));
    const data = [xs], names = [], palette = colours(), ink = gemscope.colour("soft"), faint = gemscope.colour("line");
    for (const line of plot.lines) {
      const ys = Array(xs.length).fill(null), who = Array(xs.length).fill("");
      for (const [x, y, address] of line.points) { ys[index.get(x)] = y; who[index.get(x)] = address; }
      data.push(ys); names.push(who);
    }
    // Powers of two for widths, 1-2-5 for L0: few enough to be read.
    const wide = /Width|宽/.test(box.dataset.x);
    const ticks = (_u, _i, low, high) => {
      const out = [];
      for (let e = -3; e < 24; e++) for (const m of wide ? [1] : [1, 2, 5]) {
        const v = m * (wide ? 2 : 10) ** e;
        if (v >= low * 0.999 && v <= high * 1.001) out.push(v);
      }
      return out;
    };
    const font = "12px system-ui, sans-serif";
    const axis = { stroke: ink, grid: { stroke: faint, width: 1 }, ticks: { stroke: faint }, font, labelFont: font, labelSize: 22 };
    const options = {
      width: box.clientWidth, height: 270, legend: { show: false },
      cursor: { focus: { prox: 24 }, points: { size: 9 }, drag: { x: false, y: false } },
      scales: {
        x: { time: false, distr: 3, log: wide ? 2 : 10, range: (_u, low, high) => [low / 1.15, high * 1.15] },
        y: { range: (_u, low, high) => [Math.min(0, low), high * 1.06 || 1] },
      },
      focus: { alpha: 0.25 },
      axes: [
        { ...axis, label: box.dataset.x, splits: ticks, filter: (_u, s) => s, values: (_u, s) => s.map((v) => (v >= 1024 && wide ? `${v / 1024}k` : String(v))), space: 30 },
        { ...axis, label: box.dataset.y, size: 56 },
      ],
      series: [{}].concat(plot.lines.map((line) => ({
        stroke: palette[line.family % palette.length], width: 1.3, spanGaps: true,
        dash: line.family >= palette.length ? [5, 3] : undefined,
        points: { show: true, size: 6, width: 1.3, fill: line.family % 2 ? gemscope.colour("page") : palette[line.family % palette.length] },
      }))),
      hooks: {
        setLegend: [(u) => {
          const i = u.cursor.idx;
          const best = u.series.findIndex((s, n) => n && s._focus && u.data[n][i] !== null);
          if (i === null || best < 1) return;
          at.textContent = `${names[best - 1][i]}: ${figure(u.data[0][i])}, ${figure(u.data[best][i])}`;
        }],
      },
    };
    box.replaceChildren();
    new uPlot(options, data, box);
  }

  function all() {
    for (const dot of document.querySelectorAll(".dot")) dot.style.background = colours()[dot.dataset.family % colours().length];
    if (typeof uPlot !== "undefined") document.querySelectorAll("[data-plot]").forEach(draw);
  }
  all();
  document.addEventListener("gemscope:theme", all);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(all, 150); });
})();
