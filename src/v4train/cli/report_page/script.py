"""The script of the report: fit the charts to their width, change the abscissa, point at values, choose a modality.

Plain JavaScript without a library. The page is complete without it; see `line_chart` for what it may and may not decide.
"""

SOURCE = r"""
"use strict";
(() => {
const data = JSON.parse(document.getElementById("charts").textContent);
const [TOP, RIGHT, BOTTOM, LEFT] = data.margins, BASE = data.height - BOTTOM;
const state = {clock: "step", log: false};
const SVG = "http://www.w3.org/2000/svg";
const charts = [...document.querySelectorAll("[data-chart]")].map(figure => ({
  figure, svg: figure.querySelector(".plot svg"), tip: figure.querySelector(".tip"), ...data.charts[+figure.dataset.chart]}));

const project = (v, low, high, start, end, log) => {
  if (log) [v, low, high] = [Math.log(v), Math.log(low), Math.log(high)];
  return start + (v - low) / (high - low) * (end - start);
};
const room = chart => Math.max(240, Math.round(chart.svg.parentNode.clientWidth));
const axis = () => { const c = data.choices[state.clock]; return state.log && c.log ? [c.log, true] : [c.linear, false]; };
const make = (name, attributes, text) => {
  const e = document.createElementNS(SVG, name);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  return e;
};
const number = v => {
  const a = Math.abs(v);
  for (const [limit, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "K"]])
    if (a >= limit) return +(v / (limit === 1e4 ? 1e3 : limit)).toPrecision(4) + suffix;
  return a && a < 1e-3 ? v.toExponential(2) : Number.isInteger(v) ? String(v) : v.toPrecision(4);
};

function points(chart, curve) {
  const [x, log] = axis(), along = data.abscissas[curve.abscissa][state.clock];
  return curve.values.map((v, i) => {
    const at = along[i];
    if (v === null || at === null || (log && at <= 0)) return null;
    return [project(at, x.low, x.high, LEFT, chart.width - RIGHT, log), project(v, chart.low, chart.high, BASE, TOP, chart.log), i];
  });
}
function draw(chart) {
  const width = chart.width = room(chart), end = width - RIGHT, svg = chart.svg;
  const [x, log] = axis();
  svg.setAttribute("viewBox", `0 0 ${width} ${data.height}`);
  svg.querySelector("clipPath rect").setAttribute("width", end - LEFT + 10);
  for (const line of svg.querySelectorAll("path.grid, path.base")) line.setAttribute("d", line.getAttribute("d").replace(/H.*/, "H" + end));
  const columns = svg.querySelector(".columns");
  columns.replaceChildren();
  let free = -Infinity;
  for (const [v, label] of x.ticks) {
    const at = project(v, x.low, x.high, LEFT, end, log), half = label.length * 3.6;
    if (at - half < free) continue;
    columns.append(make("text", {class: "x", x: at.toFixed(1), y: BASE + 18}, label));
    free = at + half + 12;
  }
  const name = svg.querySelector("text.name");
  name.setAttribute("x", (LEFT + end) / 2);
  name.textContent = data.choices[state.clock].name + (log ? ", logarithmic" : "");
  const happened = svg.querySelector(".events");
  happened.replaceChildren();
  for (const mark of data.marks) {
    const ends = mark.ends[state.clock].map(v => v === null || (log && v <= 0) ? null : project(v, x.low, x.high, LEFT, end, log));
    if (ends[1] === null) continue;
    const from = Math.max(LEFT, ends[0] ?? LEFT).toFixed(1), to = ends[1].toFixed(1);
    const band = make("path", {class: mark.style, d: `M${from},${TOP}H${to}V${BASE}H${from}Z`});
    band.append(make("title", {}, mark.label));
    happened.append(band);
  }
  const layer = svg.querySelector(".curves");
  layer.replaceChildren();
  chart.drawn = chart.curves.map(curve => {
    const all = points(chart, curve), seen = all.filter(p => p);
    let d = "", pen = "M";
    for (const p of all) { if (!p) { pen = "M"; continue; } d += `${pen}${p[0].toFixed(1)},${p[1].toFixed(1)}`; pen = "L"; }
    if (curve.role !== "points" || seen.length >= data.joined) layer.append(make("path", {class: `c${curve.style} ${curve.role}`, d}));
    if (curve.role === "points" || curve.role === "marked" || seen.length === 1) {
      let marks = "", free = Infinity;
      for (const p of [...seen].reverse()) if (p[0] <= free) {
        marks += `M${p[0].toFixed(1)},${p[1].toFixed(1)}${data.markers[curve.style]}`;
        free = p[0] - data.markerGap;
      }
      layer.append(make("path", {class: `c${curve.style} mark`, d: marks}));
    }
    return {curve, seen};
  });
}
function redraw() { clear(); charts.forEach(draw); }

function clear() { for (const c of charts) { c.svg.querySelector(".cross").replaceChildren(); c.tip.hidden = true; } }
function nearest(seen, at) {
  let best = null;
  for (const p of seen) if (!best || Math.abs(p[0] - at) < Math.abs(best[0] - at)) best = p;
  return best;
}
function point(chart, at) {
  clear();
  chart.at = at = Math.min(Math.max(at, LEFT), chart.width - RIGHT);
  const share = (at - LEFT) / (chart.width - RIGHT - LEFT);
  for (const c of charts) {
    const px = LEFT + share * (c.width - RIGHT - LEFT);
    c.svg.querySelector(".cross").append(make("path", {d: `M${px.toFixed(1)},${TOP}V${BASE}`}));
  }
  const cross = chart.svg.querySelector(".cross"), rows = [];
  let where = null;
  for (const {curve, seen} of chart.drawn) {
    if (curve.role === "raw") continue;
    const hit = nearest(seen, at);
    if (!hit || Math.abs(hit[0] - at) > 24) continue;
    if (!where || (where.curve.role === "points" && curve.role !== "points")) where = {curve, i: hit[2]};
    if (hit[1] >= TOP - 5 && hit[1] <= BASE + 5) cross.append(make("circle", {class: "c" + curve.style, cx: hit[0], cy: hit[1], r: 4}));
    rows.push([curve, hit]);
  }
  if (!where) return;
  chart.tip.replaceChildren();
  const head = document.createElement("b"), a = data.abscissas[where.curve.abscissa];
  head.textContent = Object.entries(data.choices).filter(([clock]) => a[clock][where.i] !== null).map(([clock, c]) => {
    const v = a[clock][where.i];
    return clock === "step" ? "step " + v.toLocaleString("en") : number(v) + " " + c.name.replace("time, ", "");
  }).join(" · ");
  chart.tip.append(head);
  for (const [curve, hit] of rows) {
    const [row, label, square, value] = ["div", "span", "i", "span"].map(name => document.createElement(name));
    square.className = "c" + curve.style;
    const step = data.abscissas[curve.abscissa].step[hit[2]];
    label.append(square, curve.label + (step === a.step[where.i] ? "" : ` (step ${step.toLocaleString("en")})`));
    value.textContent = number(curve.values[hit[2]]);
    row.append(label, value);
    chart.tip.append(row);
  }
  chart.tip.hidden = false;
  const needed = chart.tip.offsetWidth + 12;
  chart.tip.style.left = (at + needed <= chart.width || at < needed / 2 ? at + 12 : Math.max(0, at - needed)) + "px";
}
for (const chart of charts) {
  const local = event => (event.clientX - chart.svg.getBoundingClientRect().left) * chart.width / chart.svg.getBoundingClientRect().width;
  chart.svg.addEventListener("pointermove", event => point(chart, local(event)));
  chart.svg.addEventListener("pointerdown", event => point(chart, local(event)));
  chart.svg.addEventListener("pointerleave", clear);
  chart.svg.addEventListener("blur", clear);
  chart.svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: -6, ArrowRight: 6}[event.key];
    if (event.key === "Escape") clear();
    if (!move) return;
    event.preventDefault();
    point(chart, (chart.at ?? chart.width / 2) + move);
  });
}
const controls = document.querySelector(".controls");
if (controls) {
  controls.hidden = false;
  controls.addEventListener("change", () => {
    state.clock = controls.querySelector("[name=clock]:checked")?.value ?? "step";
    state.log = controls.querySelector("[name=log]:checked").value === "log";
    redraw();
  });
}
for (const figure of document.querySelectorAll("[data-heat]")) {
  const choice = figure.querySelector(".heat-choice");
  if (!choice) continue;
  const heat = JSON.parse(figure.querySelector("script").textContent), rows = [...figure.querySelectorAll(".cells")];
  const maxima = [...figure.querySelectorAll("[data-row]")];
  choice.hidden = false;
  choice.addEventListener("change", () => {
    const name = choice.querySelector(":checked").value, load = heat.load[name];
    const times = v => v === null ? "–" : v.toFixed(2) + "×";
    rows.forEach((row, i) => [...row.children].forEach((cell, j) => {
      cell.setAttribute("class", heat.classes[name][i][j]);
      cell.firstChild.textContent = cell.firstChild.textContent.replace(/: [^:]*$/, ": " + times(load[i][j]));
    }));
    for (const text of maxima) {
      const known = load[+text.dataset.row].filter(v => v !== null);
      text.textContent = times(known.length ? Math.max(...known) : null);
    }
    figure.querySelector(".heat-caption").textContent = heat.captions[name];
  });
}
redraw();
addEventListener("resize", () => { if (charts.some(c => c.width !== room(c))) redraw(); });
addEventListener("beforeprint", redraw);
addEventListener("afterprint", redraw);
})();
"""
