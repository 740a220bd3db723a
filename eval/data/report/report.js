"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const font = { family: 'Inter, "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif', size: 12.5, color: "#3b434c" };
  const number = (v) => v == null ? "–" : Math.abs(v) >= 100 ? v.toFixed(0) : Number(v.toPrecision(3)).toString();

  const band = (e) => e.low == null ? "" : ` [${number(e.low)}, ${number(e.high)}]`;

  function traces(panel, metric) {
    const log = panel.metrics[metric].log;
    return panel.rows.map((row, index) => {
      const points = panel.cells.filter((c) => c.row === index && c[metric] && c[metric].value != null);
      const up = points.map((c) => c[metric].high == null ? 0 : c[metric].high - c[metric].value);
      const down = points.map((c) => c[metric].low == null ? 0 : c[metric].value - (log ? Math.max(c[metric].low, c[metric].value / 1e3) : c[metric].low));
      return {
        type: "scatter", mode: "lines+markers", name: row.label, legendgroup: row.label,
        x: points.map((c) => c.nfe), y: points.map((c) => c[metric].value),
        line: { color: row.color, width: row.stochastic ? 1.4 : 1.9, dash: row.dash },
        marker: { color: row.color, size: 6.5, symbol: row.symbol },
        error_y: { type: "data", symmetric: false, array: up, arrayminus: down, color: row.color, thickness: 1, width: 3 },
        text: points.map((c) => `<b>${row.label}</b><br>${c.steps} steps, ${number(c.nfe)} NFE<br>`
          + `${panel.metrics[metric].label} ${number(c[metric].value)}${band(c[metric])}`),
        hovertemplate: "%{text}<extra></extra>",
      };
    }).filter((t) => t.x.length);
  }

  function layout(panel, metric) {
    const info = panel.metrics[metric];
    const axis = { gridcolor: "#eceff2", zeroline: false, linecolor: "#bfc6ce", ticks: "outside", tickcolor: "#bfc6ce", ticklen: 4 };
    const narrow = window.innerWidth < 720;
    const lines = [], notes = [];
    // The scale follows the data: a line far away is left to the text, and a solver that blew up must not flatten the rest.
    const values = panel.cells.map((c) => c[metric] && c[metric].value).filter((v) => v != null && (!info.log || v > 0)).sort((a, b) => a - b);
    let low = values[0], high = values[values.length - 1];
    if (info.line != null && (!info.log || info.line > low / 4)) { low = Math.min(low, info.line); high = Math.max(high, info.line); }
    if (info.log) {
      const gap = values.findIndex((v, i) => i > values.length / 2 && v > 3 * values[i - 1]);
      if (gap > 0) high = Math.max(values[gap - 1], low);
    }
    const range = values.length === 0 ? undefined : info.log ? [Math.log10(low / 1.35), Math.log10(high * 1.35)]
      : [low - 0.06 * (high - low), high + 0.06 * (high - low)];
    if (info.line != null && (info.log ? info.line >= low : true)) {
      lines.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: info.line, y1: info.line, line: { color: "#8b94a0", width: 1, dash: "dot" } });
      notes.push({ xref: "paper", x: 0, xanchor: "left", y: info.log ? Math.log10(info.line) : info.line, yanchor: "bottom", showarrow: false,
        text: `${info.line_label} ${number(info.line)}`, font: { size: 11, color: "#5b6470" } });
    }
    return {
      font, paper_bgcolor: "#fff", plot_bgcolor: "#fff", margin: { l: 62, r: 12, t: 34, b: narrow ? 130 : 52 },
      xaxis: { ...axis, type: "log", title: { text: panel.x_title, standoff: 10, font: { size: 13 } }, tickvals: panel.ticks, ticktext: panel.ticks.map(String), showgrid: false },
      yaxis: { ...axis, range, type: info.log ? "log" : "linear", title: { text: info.label, standoff: 8, font: { size: 13 } }, dtick: info.log ? (range && range[1] - range[0] > 2.6 ? 1 : "D2") : undefined,
        tickformat: info.log ? "~g" : info.format, exponentformat: "none" },
      legend: narrow ? { orientation: "h", y: -0.22, font: { size: 11 } } : { x: 1.015, y: 1, font: { size: 12, family: "Menlo, Consolas, 'Liberation Mono', monospace" }, tracegroupgap: 0 },
      hoverlabel: { bgcolor: "#fff", bordercolor: "#cfd5db", font: { ...font, color: "#16191d" }, align: "left" },
      hovermode: "closest", shapes: lines, annotations: notes,
    };
  }

  const options = { responsive: true, displaylogo: false, displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { format: "svg", filename: "fewstep-quality-against-nfe" } };

  function press(group, value) {
    for (const b of group.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b.value === value));
  }

  data.panels.forEach((panel) => {
    const section = document.getElementById(panel.id);
    const chart = section.querySelector(".chart");
    if (!chart) return;
    const show = (metric) => {
      Plotly.react(chart, traces(panel, metric), layout(panel, metric), options);
      for (const node of section.querySelectorAll("[data-metric]")) node.hidden = node.dataset.metric !== metric;
    };
    const metrics = section.querySelector(".switch.metric");
    metrics.addEventListener("click", (event) => {
      if (!event.target.value) return;
      press(metrics, event.target.value);
      show(event.target.value);
    });
    show(metrics.querySelector("[aria-pressed=true]").value);

    const budgets = section.querySelector(".switch.budget");
    if (!budgets) return;
    budgets.addEventListener("click", (event) => {
      const budget = event.target.value;
      if (!budget) return;
      press(budgets, budget);
      for (const node of section.querySelectorAll("[data-strip]")) {
        const strip = (panel.strips[node.dataset.strip] || {})[budget];
        node.querySelector("img").hidden = !strip;
        node.querySelector(".empty").hidden = !!strip;
        if (strip) node.querySelector("img").src = strip.src; else node.querySelector(".empty").textContent = `no run with ${budget} evaluations`;
        node.nextElementSibling.textContent = strip ? strip.note : "";
      }
    });
  });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy).textContent;
      try { await navigator.clipboard.writeText(text); } catch {
        const range = document.createRange();
        range.selectNodeContents(document.getElementById(button.dataset.copy));
        const selection = getSelection(); selection.removeAllRanges(); selection.addRange(range); document.execCommand("copy");
      }
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
})();
