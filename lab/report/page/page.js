"use strict";
(() => {
  const { runs, plots } = JSON.parse(document.getElementById("data").textContent);
  const shown = runs.map(() => true);
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  const escaped = (text) => text.replace(/[&<>"]/g, (c) => entities[c]); // Plotly reads names as a kind of HTML
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const paper = { width: 680, height: 300 }; // px of a plot on A4
  let printing = false;
  const slider = document.getElementById("smooth");

  /** The mean over `width` neighbors of each value, fewer at the ends. */
  function smooth(values, width) {
    const half = Math.floor(width / 2);
    const sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + value);
    return values.map((_, i) => {
      const a = Math.max(0, i - half), b = Math.min(values.length, i + half + 1);
      return (sums[b] - sums[a]) / (b - a);
    });
  }

  /** What Plotly draws for one series of the page's data. */
  function trace(series, kind) {
    const run = runs[series.run];
    const color = css(`--c${run.color}`);
    const width = slider && kind === "loss" && series.key === "loss" ? Number(slider.value) : 1;
    const points = series.key === "val_loss";
    const digits = kind === "speed" ? ",.0f" : ".4~f";
    const drawn = {
      x: series.x, y: width > 1 ? smooth(series.y, width) : series.y,
      type: "scatter", mode: points ? "markers" : kind === "length" ? "lines+markers" : "lines",
      name: escaped(series.label), meta: series.run, visible: shown[series.run],
      line: { color, dash: run.dash, width: 2 },
      marker: { color, symbol: run.marker + (points || series.open ? "-open" : ""), size: 8, line: { color, width: 1.5 } },
      hovertemplate: `%{y:${digits}}<extra>${escaped(series.label)}</extra>`,
    };
    if (series.error) drawn.error_y = { type: "data", array: series.error, color, thickness: 1, width: 3 };
    return drawn;
  }

  function axis(title, more) {
    return {
      title: { text: title, font: { size: 13 }, standoff: 10 }, gridcolor: css("--line"), linecolor: css("--soft"), zeroline: false,
      automargin: true, ...more,
    };
  }

  function layout(plot) {
    const soft = css("--soft");
    return {
      ...(printing ? paper : { autosize: true }),
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 12, color: soft },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 12, b: 48 },
      showlegend: false, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", uirevision: "keep",
      hoverlabel: { bgcolor: css("--tint"), bordercolor: css("--line"), font: { color: css("--text") }, namelength: -1 },
      xaxis: axis(plot.x_title, plot.x_axis), yaxis: axis(plot.y_title, plot.y_axis),
      shapes: (plot.marks || []).map((x) => ({
        type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: soft, width: 2, dash: "2px,4px" },
      })),
    };
  }

  function draw() {
    const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    for (const [kind, plot] of Object.entries(plots)) {
      const traces = plot.series.map((series) => trace(series, kind));
      Plotly.react(`plot-${kind}`, traces, layout(plot), config);
    }
  }

  /** Mark the lowest number of each column that has a contest among the rows shown. */
  function markLowest() {
    for (const table of document.querySelectorAll("table.contest")) {
      const best = new Map();
      const cells = [...table.querySelectorAll("td[data-value]")];
      const live = cells.filter((cell) => !cell.parentElement.hidden);
      for (const cell of live) {
        const column = best.get(cell.cellIndex) || { least: Infinity, count: 0 };
        best.set(cell.cellIndex, { least: Math.min(column.least, Number(cell.dataset.value)), count: column.count + 1 });
      }
      for (const cell of cells) {
        const column = best.get(cell.cellIndex);
        cell.classList.toggle("lowest", Boolean(column) && column.count > 1 && Number(cell.dataset.value) === column.least);
      }
    }
  }

  function update() {
    for (const chip of document.querySelectorAll("button[data-run]")) chip.setAttribute("aria-pressed", shown[chip.dataset.run]);
    for (const part of document.querySelectorAll("main [data-run]")) part.hidden = !shown[part.dataset.run];
    markLowest();
    draw();
  }

  for (const button of document.querySelectorAll(".chips button")) {
    button.addEventListener("click", () => {
      if ("run" in button.dataset) shown[button.dataset.run] = !shown[button.dataset.run];
      else shown.fill(button.dataset.all === "true");
      update();
    });
  }
  if (slider) {
    slider.addEventListener("input", () => {
      document.getElementById("smooth-value").textContent = slider.value;
      draw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const print = (begins) => {
    if (printing === begins) return;
    printing = begins;
    document.documentElement.classList.toggle("paper", begins); // beforeprint comes while the screen's colors still hold
    draw(); // in the colors and the width of the paper, or of the screen again
    if (!begins) for (const kind of Object.keys(plots)) Plotly.Plots.resize(`plot-${kind}`);
  };
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  update();
})();
