"use strict";
// Everything that a run or a model has written is put in by textContent: it is never read as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const PALETTE = ["#0969da", "#d1742f", "#1a7f37", "#cf222e", "#8250df", "#7d4e00", "#bf3989", "#57606a"];
const colour = (run) => PALETTE[run % PALETTE.length];
const byId = (id) => document.getElementById(id);

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

// Curves

// The mean of the finite values among the last `window` ones; where a value is missing, there is no point.
function smoothed(values, window) {
  if (window < 2) return values;
  return values.map((value, end) => {
    if (value === null) return null;
    const part = values.slice(Math.max(0, end - window + 1), end + 1).filter((one) => one !== null);
    return part.reduce((sum, one) => sum + one, 0) / part.length;
  });
}

// Metrics of which no run has two points, such as those of the only validation, are bars.
const single = (metric) => RUNS.every((run) => !(metric in run.series) || run.series[metric][0].length < 2);

function bars(metric) {
  const has = RUNS.map((run, index) => index).filter((index) => metric in RUNS[index].series);
  return [{ type: "bar", x: has.map((index) => RUNS[index].name), y: has.map((index) => RUNS[index].series[metric][1][0]),
    marker: { color: has.map(colour) }, width: 0.5, hovertemplate: "%{y:.4g}<extra></extra>", showlegend: false }];
}

function traces(metric, window) {
  if (single(metric)) return bars(metric);
  const found = [];
  RUNS.forEach((run, index) => {
    if (!(metric in run.series)) return;
    const [steps, values] = run.series[metric], few = steps.length < 30;
    if (window > 1 && !few) {
      found.push({ x: steps, y: values, mode: "lines", line: { color: colour(index), width: 1 }, opacity: 0.22,
        hoverinfo: "skip", showlegend: false });
    }
    found.push({ x: steps, y: few ? values : smoothed(values, window), name: run.name, showlegend: false,
      mode: few ? "lines+markers" : "lines", line: { color: colour(index), width: 2 }, marker: { size: 5 },
      hovertemplate: "%{y:.4g}" });
  });
  return found;
}

function eventLines() {
  const shapes = [];
  RUNS.forEach((run, index) => run.events.forEach((event) => {
    shapes.push({ type: "line", xref: "x", yref: "paper", x0: event.step, x1: event.step, y0: 0, y1: 1,
      line: { color: colour(index), width: 1, dash: "dot" } });
  }));
  return shapes;
}

function draw(box) {
  const metric = box.dataset.metric, layout = {
    title: { text: metric.replaceAll("<", "&lt;"), font: { size: 13 }, x: 0.02, xanchor: "left" }, hovermode: "x unified",
    margin: { l: 52, r: 12, t: 32, b: 28 }, font: { family: "system-ui, sans-serif", size: 11 },
    shapes: single(metric) ? [] : eventLines(),
    yaxis: { type: byId("log").checked ? "log" : "linear", gridcolor: "#eaeef2", zerolinecolor: "#d0d7de",
      automargin: true },
    xaxis: { gridcolor: "#eaeef2", zeroline: false }, hoverlabel: { namelength: 40 },
  };
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  Plotly.react(box, traces(metric, Number(byId("smooth").value)), layout, options);
  box.dataset.drawn = "1";
}

// A chart is drawn when it comes into sight: there are dozens.
const sight = new IntersectionObserver((entries) => entries.forEach((entry) => {
  entry.target.dataset.seen = entry.isIntersecting ? "1" : "";
  if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
}), { rootMargin: "300px" });

function redraw() {
  byId("smooth-value").textContent = `${byId("smooth").value} steps`;
  document.querySelectorAll(".chart").forEach((box) => {
    if (box.dataset.seen) draw(box); else box.dataset.drawn = "";
  });
}

function buildCurves() {
  DATA.groups.forEach((group) => {
    byId("charts").append(make("h2", group.title));
    const grid = make("div", null, "grid");
    group.metrics.forEach((metric) => {
      const box = make("div", null, "chart");
      box.dataset.metric = metric;
      grid.append(box);
      sight.observe(box);
    });
    byId("charts").append(grid);
    if (group.constant.length) {
      const words = group.constant.map(([metric, value]) => `${metric} ${short(value)}`).join(", ");
      byId("charts").append(make("p", `one value only: ${words}`, "hint"));
    }
  });
  byId("smooth").addEventListener("input", redraw);
  byId("log").addEventListener("change", redraw);
  redraw();
}

// Samples

const ORANGE = "234, 118, 20", BLUE = "9, 105, 218", RED = "207, 34, 46";
const QUANTITIES = [];  // {value, label, of(sample) -> numbers or undefined, paint(number) -> colour, legend}
const VIEWS = [...new Set(RUNS.flatMap((run) => run.samples.flatMap((sample) => Object.keys(sample.views || {}))))];
const upTo = (rgb, most) => (x) => `rgba(${rgb}, ${(0.85 * Math.sqrt(Math.min(Math.max(x, 0), most) / most)).toFixed(3)})`;
VIEWS.forEach((view) => QUANTITIES.push({ value: `kl:${view}`, label: `perception KL (${view})`, unit: "nats",
  of: (s) => s.views && s.views[view] && s.views[view].kl, paint: upTo(ORANGE, 3), legend: ["0", "3 nats and more", ORANGE] }));
const surprise = upTo(RED, 5);
QUANTITIES.push({ value: "log_prob", label: "log-prob", unit: "nats", of: (s) => s.log_prob, paint: (x) => surprise(-x),
  legend: ["certain", "−5 nats", RED] });
VIEWS.forEach((view) => QUANTITIES.push({ value: `lp:${view}`, label: `log-prob under ${view}`, unit: "nats",
  of: (s) => s.views && s.views[view] && s.views[view].log_prob, paint: (x) => surprise(-x), legend: ["certain", "−5 nats", RED] }));
const gain = upTo(BLUE, 2), loss = upTo(RED, 2);
QUANTITIES.push({ value: "advantage", label: "advantage", unit: "", of: (s) => s.advantage,
  paint: (x) => (x < 0 ? loss(-x) : gain(x)), legend: ["−2 red", "2 blue", BLUE] });
QUANTITIES.push({ value: "none", label: "none", unit: "", of: () => undefined, paint: () => "", legend: null });

const ALL = RUNS.flatMap((run, index) => run.samples.map((sample) => ({ ...sample, run: index })));
let shown = 60;

function picked() {
  const run = byId("f-run").value, split = byId("f-split").value, answer = byId("f-answer").value;
  const kept = ALL.filter((s) => (run === "" || s.run === Number(run)) && (!split || s.split === split) &&
    (!answer || (answer === "changed" ? s.changed : s.right === (answer === "right"))));
  const order = (a, b) => a.step - b.step || a.run - b.run;
  const question = (a, b) => a.uid.localeCompare(b.uid) || a.run - b.run || a.step - b.step;
  return kept.sort(byId("f-order").value === "question" ? question : order);
}

function card(sample) {
  const box = make("article", null, "card"), head = make("div", null, "head"), run = RUNS[sample.run];
  const mark = sample.right === null ? "#8c959f" : sample.right ? "#1a7f37" : "#cf222e";
  box.style.setProperty("--mark", mark);
  box.dataset.right = String(sample.right);
  const name = make("span", run.name, "run");
  name.style.setProperty("--run", colour(sample.run));
  head.append(name, make("span", `step ${sample.step}`), make("span", sample.split === "val" ? "validation" : "training"),
    make("span", sample.uid.split("/").pop()));
  if (sample.drawn_under_view) head.append(make("span", "drawn under a view"));
  box.append(head);
  Object.entries(sample.pictures || {}).forEach(([view, file]) => {
    if (!(file in run.pictures)) return;
    const figure = make("figure"), image = make("img");
    image.src = run.pictures[file];
    image.alt = view;
    figure.append(image, make("figcaption", view));
    box.append(figure);
  });
  box.append(make("div", sample.prompt, "prompt"), response(sample));
  const score = make("div", null, "score");
  score.append(make("span", `truth: ${sample.answer}`));
  Object.entries(sample.score).forEach(([part, value]) => score.append(make("span", `${part} ${short(value)}`)));
  if (sample.not_graded) score.append(make("span", `not graded: ${sample.not_graded}`));
  box.append(score);
  return box;
}

function response(sample) {
  const box = make("div", null, "response"), quantity = QUANTITIES.find((q) => q.value === byId("f-colour").value);
  if (!sample.tokens) {
    box.textContent = sample.response;
    return box;
  }
  const values = quantity.of(sample);
  sample.tokens.forEach((text, place) => {
    const token = make("span", text, "token");
    if (values) token.style.backgroundColor = quantity.paint(values[place]);
    token.title = QUANTITIES.filter((q) => q.of(sample)).map((q) => `${q.label}: ${short(q.of(sample)[place])} ${q.unit}`).join("\n");
    box.append(token);
  });
  return box;
}

function showSamples() {
  const found = picked(), quantity = QUANTITIES.find((q) => q.value === byId("f-colour").value);
  byId("count").textContent = `${found.length} of ${ALL.length} samples; hover over a token for its numbers`;
  byId("cards").replaceChildren(...found.slice(0, shown).map(card));
  byId("more").hidden = found.length <= shown;
  const legend = byId("legend");
  legend.replaceChildren();
  if (quantity.legend) {
    const [low, high, rgb] = quantity.legend, bar = make("span", null, "bar");
    bar.style.background = `linear-gradient(to right, ${quantity.value === "advantage" ? `rgb(${RED}), #fff` : "#fff"}, rgb(${rgb}))`;
    legend.append(make("span", `${low} `), bar, make("span", ` ${high}`));
  }
}

function buildSamples() {
  const option = (text, value) => { const one = make("option", text); one.value = value; return one; };
  byId("f-run").append(option("all", ""), ...RUNS.map((run, index) => option(run.name, index)));
  QUANTITIES.forEach((q) => byId("f-colour").append(option(q.label, q.value)));
  if (ALL.some((s) => s.split === "train" && s.views)) byId("f-split").value = "train";  // these show what this is about
  ["f-run", "f-split", "f-answer", "f-colour", "f-order"].forEach((id) => byId(id).addEventListener("change", () => {
    shown = 60;
    showSamples();
  }));
  byId("more").addEventListener("click", () => { shown += 60; showSamples(); });
  showSamples();
}

// Runs

function table(heads, rows) {
  const made = make("table"), top = make("tr");
  heads.forEach((head) => top.append(make("th", head)));
  made.append(top);
  rows.forEach((row) => {
    const line = make("tr");
    row.forEach((cell) => line.append(make("td", short(cell))));
    made.append(line);
  });
  return made;
}

const NAMES = ["trainer.experiment_name", "trainer.output_dir", "trainer.project_name"];

function buildAbout() {
  const about = byId("about"), names = RUNS.map((run) => run.name);
  const rows = (of) => [...new Set(RUNS.flatMap((run) => Object.keys(of(run))))].map((key) => [key, ...RUNS.map((run) => of(run)[key])]);
  const same = (row) => row.slice(2).every((cell) => JSON.stringify(cell) === JSON.stringify(row[1]));
  const settings = rows((run) => run.settings);
  // Of what only some runs have, such as a term, its kind and numbers; not every default of it.
  const differing = settings.filter((row) => !same(row) && !NAMES.includes(row[0]) &&
    (row.slice(1).every((cell) => cell !== undefined) || /(kind|coef|prob|estimator|view)$/.test(row[0])));
  if (RUNS.length > 1) about.append(make("h2", "Settings that differ"), table(["key", ...names], differing));
  about.append(make("h2", "Model, data, seed"), table(["key", ...names], settings.filter((row) =>
    ["worker.actor.model.model_path", "data.train_files", "data.val_files", "trainer.seed", "worker.rollout.name"].includes(row[0]))));
  about.append(make("h2", "Results"), table(["", ...names], rows((run) => run.summary)));
  about.append(make("h2", "Seconds of a step by phase"), phases());
  about.append(make("h2", "Machine"), table(["", ...names], rows((run) => run.machine)));
  const all = make("details");
  all.append(make("summary", "All settings"), table(["key", ...names], settings));
  about.append(make("h2", ""), all);
}

function phases() {
  const box = make("div"), mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
  box.style.height = `${90 + 40 * RUNS.length}px`;
  box.id = "phases";
  const metrics = [...new Set(RUNS.flatMap((run) => Object.keys(run.series)))].filter((metric) =>
    metric.startsWith("timing_s/") && !["timing_s/step", "timing_s/reward_slowest"].includes(metric));
  box.draw = () => Plotly.react(box, metrics.map((metric) => ({ type: "bar", orientation: "h",
    name: metric.slice("timing_s/".length), y: RUNS.map((run) => run.name),
    x: RUNS.map((run) => (metric in run.series ? mean(run.series[metric][1].filter((one) => one !== null)) : 0)),
    hovertemplate: "%{x:.3g} s" })), { barmode: "stack", margin: { l: 160, r: 12, t: 8, b: 30 }, legend: { orientation: "h", y: -0.25 } },
    { displaylogo: false, responsive: true });
  return box;
}

RUNS.forEach((run, index) => {
  const name = make("span", run.name, "run");
  name.style.setProperty("--run", colour(index));
  byId("runs").append(name);
});
document.querySelectorAll("#tabs button").forEach((button) => button.addEventListener("click", () => {
  document.querySelectorAll("#tabs button").forEach((one) => one.classList.toggle("active", one === button));
  document.querySelectorAll("main > section").forEach((one) => { one.hidden = one.id !== button.dataset.tab; });
  if (button.dataset.tab === "about") byId("phases").draw();
}));
buildCurves();
buildSamples();
buildAbout();
document.body.dataset.ready = "1";
