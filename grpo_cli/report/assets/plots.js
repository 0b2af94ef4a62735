"use strict";
// The curves: a figure each, drawn when its turn comes. Names go to Plotly escaped, since it reads them as HTML.

const curves = parsed("data-curves");
const isOneRun = curves.runs.length === 1;
const hiddenRuns = new Set();
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
// By default Plotly offers to upload a chart to its makers.
const CONFIG = {
  displaylogo: false,
  responsive: true,
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

// Of several runs each has a colour, and lines of one run differ in their dashes; phases of a stack have colours.
function byColour(plot) {
  return isOneRun || plot.stacked;
}

function lineColour(line, plot) {
  return colour(byColour(plot) ? line.place : line.run);
}

function lineName(line, plot) {
  const several = new Set(plot.lines.map((one) => one.place)).size > 1;
  if (byColour(plot)) return line.label;
  return several ? `${curves.runs[line.run]}: ${line.label}` : curves.runs[line.run];
}

// A closed shape around what lies between two curves; their gaps are left out.
function band(line, plot) {
  const x = curves.steps[line.x];
  const kept = x.map((_, place) => place).filter((place) => line.low[place] !== null && line.high[place] !== null);
  const back = [...kept].reverse();
  return {
    type: "scatter", mode: "lines", fill: "toself", hoverinfo: "skip", line: { width: 0 }, opacity: 1,
    fillcolor: `${lineColour(line, plot)}26`,
    x: [...kept, ...back].map((place) => x[place]),
    y: [...kept.map((place) => line.high[place]), ...back.map((place) => line.low[place])],
  };
}

function traces(plot) {
  const made = [];
  for (const line of plot.lines) {
    const x = curves.steps[line.x];
    const own = { type: "scatter", name: escaped(lineName(line, plot)), x, run: line.run };
    const stroke = { color: lineColour(line, plot), dash: byColour(plot) ? "solid" : DASHES[line.place % DASHES.length] };
    if (plot.stacked) {
      const y = line.y.map((value) => value ?? 0);
      made.push({ ...own, y, mode: "lines", stackgroup: "one", line: { width: 0.5, color: stroke.color } });
      continue;
    }
    if (line.low) made.push({ ...band(line, plot), run: line.run });
    const mode = line.dots ? "lines+markers" : "lines";
    const width = line.smooth ? 1 : 1.75;
    made.push({ ...own, y: line.y, mode, opacity: line.smooth ? 0.55 : 1, marker: { size: 4 }, line: { ...stroke, width } });
    if (line.smooth) {
      const name = `${own.name}, running mean of ${line.window} steps`;
      made.push({ ...own, name, y: line.smooth, mode: "lines", line: { ...stroke, width: 2.75 } });
    }
  }
  for (const trace of made) {
    trace.visible = !hiddenRuns.has(trace.run);
    trace.showlegend = false;
    delete trace.run;
  }
  return made;
}

function layout(plot) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--quiet").trim();
  const ends = plot.lines.map((line) => curves.steps[line.x]).flatMap((steps) => [steps[0], steps[steps.length - 1]]);
  const isShort = Math.max(...ends) - Math.min(...ends) < 6;
  const isLarge = plot.lines.some((line) => line.y.some((value) => value >= 1e4));
  const axis = { gridcolor: style.getPropertyValue("--grid").trim(), zeroline: false, automargin: true, nticks: 6 };
  return {
    height: 230,
    margin: { l: 44, r: 10, t: 8, b: 36 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 11, color: ink },
    hovermode: "x unified",
    hoverdistance: -1,
    hoverlabel: {
      namelength: -1, bgcolor: style.getPropertyValue("--card").trim(), font: { color: style.getPropertyValue("--ink").trim() },
    },
    xaxis: {
      ...axis, showgrid: false, tickformat: "d", dtick: isShort ? 1 : undefined,
      title: { text: "step", standoff: 4, font: { size: 10 } },
    },
    yaxis: { ...axis, rangemode: plot.stacked ? "tozero" : "normal", exponentformat: "e", tickformat: isLarge ? "~s" : undefined },
    modebar: { bgcolor: "transparent", color: ink, activecolor: ink },
    showlegend: false,
  };
}

function legendOf(plot) {
  const entries = new Map();
  for (const line of plot.lines) entries.set(line.place, line);
  if (entries.size < 2) return [];
  const marks = [...entries.values()].map((line) => {
    const kind = byColour(plot) ? `swatch colour-${line.place % 8}` : `dash dash-${line.place % DASHES.length}`;
    return element("span", {}, element("i", { className: kind }), line.label);
  });
  return [element("p", { className: "legend" }, ...marks)];
}

const figures = [];

function addFigure(plot, grid) {
  const frame = element("div", { className: "plot" });
  const figure = element(
    "figure", {}, element("h3", { textContent: plot.title }), element("p", { className: "about", textContent: plot.about }),
    ...legendOf(plot), frame,
  );
  grid.append(figure);
  const draw = () => Plotly.react(frame, traces(plot), layout(plot), CONFIG);
  figures.push(draw);
  queue.add(draw);
  inView.observe(frame);
  frame.draw = draw;
}

const inView = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting) continue;
    queue.first(target.draw);
    inView.unobserve(target);
  }
});

// A stack for each run: stacks cannot lie over each other.
function figuresOf(plot) {
  if (!plot.stacked || isOneRun) return [plot];
  return curves.runs.map((name, run) => ({
    ...plot, title: `${plot.title}: ${name}`,
    lines: plot.lines.filter((line) => line.run === run),
  })).filter((one) => one.lines.length);
}

function addSections() {
  const parent = document.getElementById("plots");
  curves.sections.forEach((section, place) => {
    const grid = element("div", { className: "grid" });
    const part = element("section", { id: `section-${place}` }, element("h2", { textContent: section.title }), grid);
    section.plots.flatMap(figuresOf).forEach((plot) => addFigure(plot, grid));
    if (section.zero.length) {
      part.append(element("p", { className: "quiet", textContent: `Always 0: ${section.zero.join(", ")}.` }));
    }
    parent.append(part);
  });
}

// The runs' colours; a click hides a run in all plots.
function addRunLegend() {
  const legend = document.getElementById("legend");
  curves.runs.forEach((name, run) => {
    const mark = element("i", { className: `swatch colour-${run % 8}` });
    const button = element("button", { type: "button", title: "show or hide" }, mark, name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      button.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
      redraw();
    });
    legend.append(button);
  });
}

function redraw() {
  figures.forEach((draw) => queue.add(draw));
}

if (!isOneRun) addRunLegend();
addSections();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
