"use strict";
// The browser of completions: a step, a prompt, and its group side by side; or all that a search and a filter find.

const MOST_FOUND = 48;
const VIEWS = { text: "text", logprobs: "log-probability", ratios: "ratio" };
const CUT_OFF = ["length", "lost"];
const LIMITS = ["reward", "advantage"];

const state = { run: 0, step: 0, group: 0, view: "text", search: "", limits: {} };
let stored = [];
const controls = {};

function steps() {
  return stored[state.run];
}

function isCut(said) {
  return Array.isArray(said) && typeof said[1] === "number";
}

// What is searched: a text, both ends of one that was cut, or the messages of a conversation.
function wordsOf(said) {
  if (typeof said === "string") return said;
  if (isCut(said)) return `${said[0]}\n${said[2]}`;
  return said.map((message) => [message.content, ...message.calls].map(wordsOf).join("\n")).join("\n");
}

function marked(text) {
  const sought = state.search.toLowerCase();
  const lower = text.toLowerCase();
  if (!sought || lower.length !== text.length) return [text];
  const parts = [];
  let end = 0;
  for (let place = lower.indexOf(sought); place >= 0; place = lower.indexOf(sought, end)) {
    parts.push(text.slice(end, place), element("mark", {}, text.slice(place, place + sought.length)));
    end = place + sought.length;
  }
  return [...parts, text.slice(end)];
}

function gap(number, what) {
  return element("span", { className: "gap", textContent: `… ${number.toLocaleString("en")} ${what} left out …` });
}

function passage(said) {
  const parts = isCut(said) ? [...marked(said[0]), gap(said[1], "characters"), ...marked(said[2])] : marked(said);
  return element("div", { className: "said" }, ...parts);
}

function messageOf(message, isPrompt) {
  const isPolicy = message.role === "assistant";
  const words = wordsOf(message.content);
  const isFound = state.search && words.toLowerCase().includes(state.search.toLowerCase());
  const summary = element("summary", {}, [message.role, message.name].filter(Boolean).join(" "));
  const part = element("details", { className: isPolicy ? "turn policy" : "turn", open: isPrompt || isPolicy || isFound || words.length < 160 }, summary);
  if (words) part.append(passage(message.content));
  for (const call of message.calls) {
    const isCalled = Boolean(state.search) && wordsOf(call).toLowerCase().includes(state.search.toLowerCase());
    part.append(element("details", { className: "call", open: isCalled }, element("summary", {}, "tool call"), passage(call)));
  }
  return part;
}

function saidOf(said, isPrompt = false) {
  return Array.isArray(said) && !isCut(said) ? said.map((message) => messageOf(message, isPrompt)) : [passage(said)];
}

// Of a log-probability in hundredths and of a ratio in thousandths above 1: how strong, and which way.
function shadeOf(view, value) {
  if (view === "logprobs") return [Math.min(1, -value / 500), "high"];
  const log = Math.log(Math.max(1e-3, 1 + value / 1000));
  return [Math.min(1, Math.abs(log) / Math.log(2)), log > 0 ? "high" : "low"];
}

function tooltip(pieces, place) {
  const logprob = pieces.logprobs[place];
  const ratio = pieces.ratios && pieces.ratios[place];
  const parts = [];
  if (logprob !== null) parts.push(`log-probability ${(logprob / 100).toFixed(2)} (${(100 * Math.exp(logprob / 100)).toPrecision(3)} %)`);
  if (ratio !== null) parts.push(`ratio ${(1 + ratio / 1000).toFixed(3)}`);
  return parts.join(", ") || "no value";
}

function tokens(pieces) {
  const values = pieces[state.view];
  const read = new Set(pieces.read);
  const box = element("div", { className: "said tokens" });
  pieces.texts.forEach((text, place) => {
    if (pieces.gap && pieces.gap[0] === place) box.append(gap(pieces.gap[1], "tokens"));
    const token = element("span", { textContent: text, title: read.has(place) ? "read, not sampled" : tooltip(pieces, place) });
    if (read.has(place)) token.className = "read";
    else if (values && values[place] !== null) {
      const [strength, way] = shadeOf(state.view, values[place]);
      token.style.backgroundColor = `rgb(var(--${way}) / ${strength.toFixed(2)})`;
    }
    box.append(token);
  });
  return box;
}

function named(pairs, className, write) {
  const rows = pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, write(value))));
  return element("dl", { className }, ...rows);
}

function card({ completion, step, group }, isFound) {
  const advantage = completion.advantage;
  const sign = advantage > 0 ? "good" : advantage < 0 ? "bad" : "";
  const head = element(
    "header", {}, element("b", { textContent: `reward ${shown(completion.reward)}` }),
    element("span", { className: `chip ${sign}`, textContent: `advantage ${shown(advantage)}` }),
    element("span", { className: CUT_OFF.includes(completion.finish) ? "chip notable" : "chip", textContent: completion.finish }),
    element("span", { className: "quiet", textContent: `${completion.tokens} tokens, sample ${completion.sample}` }),
  );
  const made = element("article", { className: "completion" }, head);
  if (isFound) {
    const place = element("button", { type: "button", textContent: `step ${step.step}, group ${group.group}` });
    place.addEventListener("click", () => goTo(step, group));
    head.prepend(place);
  }
  if (completion.rewards.length > 1) made.append(named(completion.rewards, "rewards", shown));
  const asTokens = state.view !== "text" && completion.pieces;
  made.append(...(asTokens ? [tokens(completion.pieces)] : saidOf(completion.said)));
  if (completion.extras.length) made.append(named(completion.extras, "extras", (value) => wordsOf(value)));
  return made;
}

function isFiltered() {
  return state.search !== "" || Object.values(state.limits).some((value) => value !== null);
}

function isMatch(completion, group) {
  for (const name of LIMITS) {
    const value = completion[name];
    const [least, most] = [state.limits[`${name} from`] ?? null, state.limits[`${name} to`] ?? null];
    if (value === null && (least !== null || most !== null)) return false;
    if (least !== null && value < least || most !== null && value > most) return false;
  }
  const sought = state.search.toLowerCase();
  return !sought || wordsOf(completion.said).toLowerCase().includes(sought) || wordsOf(group.prompt).toLowerCase().includes(sought);
}

function all() {
  return steps().flatMap((step) => step.groups.flatMap((group) => group.completions.map((completion) => ({ step, group, completion }))));
}

function goTo(step, group) {
  clearFilters();
  state.step = steps().indexOf(step);
  state.group = step.groups.indexOf(group);
  show();
}

function clearFilters() {
  state.search = "";
  state.limits = {};
  controls.filters.forEach((input) => { input.value = ""; });
}

function promptOf(group) {
  return element("details", { className: "prompt", open: true }, element("summary", {}, "prompt"), ...saidOf(group.prompt, true));
}

function showGroup() {
  const step = steps()[state.step];
  const group = step.groups[state.group];
  const parts = [`Step ${step.step}, group ${group.group}`];
  if (step.groups.length < group.of) parts.push(`${step.groups.length} of ${group.of} groups are here`);
  if (group.completions.length < group.size) parts.push(`${group.completions.length} of ${group.size} completions are here`);
  controls.status.textContent = parts.join(" · ");
  const ordered = [...group.completions].sort((one, other) => (other.reward ?? -Infinity) - (one.reward ?? -Infinity));
  controls.result.replaceChildren(
    promptOf(group), element("div", { className: "side-by-side" }, ...ordered.map((completion) => card({ completion, step, group }, false))),
  );
}

function showFound() {
  const everything = all();
  const found = everything.filter(({ completion, group }) => isMatch(completion, group));
  const few = found.length > MOST_FOUND ? `; the first ${MOST_FOUND} are shown` : "";
  controls.status.textContent = `${found.length} of the ${everything.length} completions on this page match${few}`;
  const cards = found.slice(0, MOST_FOUND).map((one) => card(one, true));
  controls.result.replaceChildren(element("div", { className: "side-by-side" }, ...cards));
}

function show() {
  if (!steps().length) {
    controls.status.textContent = "This run has stored no completions.";
    return controls.result.replaceChildren();
  }
  const step = steps()[state.step];
  controls.slider.max = String(steps().length - 1);
  controls.slider.value = String(state.step);
  controls.stepName.textContent = `step ${step.step}`;
  controls.groups.replaceChildren(...step.groups.map((group, place) => {
    const why = group.reasons.length ? ` (${group.reasons.join(", ")})` : "";
    return element("option", { value: String(place), textContent: `group ${group.group}${why}`, selected: place === state.group });
  }));
  const hasTokens = steps().some((one) => one.groups.some((group) => group.completions.some((completion) => completion.pieces)));
  controls.shades.hidden = state.view === "text";
  controls.shades.dataset.view = state.view;
  controls.views.forEach((input) => {
    input.checked = input.value === state.view;
    input.disabled = !hasTokens && input.value !== "text";
    input.parentElement.title = input.disabled ? "this run has not stored the texts of its tokens" : "";
  });
  if (isFiltered()) showFound();
  else showGroup();
}

function labelled(text, ...inputs) {
  return element("label", {}, element("span", {}, text), ...inputs);
}

function stepControls() {
  controls.slider = element("input", { type: "range", min: "0", value: "0", id: "step" });
  controls.stepName = element("output", {});
  controls.groups = element("select", { id: "group" });
  controls.slider.addEventListener("input", () => {
    clearFilters();
    state.step = Number(controls.slider.value);
    state.group = 0;
    show();
  });
  controls.groups.addEventListener("change", () => {
    clearFilters();
    state.group = Number(controls.groups.value);
    show();
  });
  const made = [labelled("step", controls.slider, controls.stepName), labelled("prompt's group", controls.groups)];
  if (curves.runs.length > 1) made.unshift(labelled("run", runSelect()));
  return made;
}

function runSelect() {
  const options = curves.runs.map((name, run) => element("option", { value: String(run), textContent: name }));
  const select = element("select", { id: "run" }, ...options);
  select.addEventListener("change", () => {
    const run = Number(select.value);
    Object.assign(state, { run, step: stored[run].length - 1, group: 0 });
    show();
  });
  return select;
}

function viewControls() {
  controls.views = Object.keys(VIEWS).map((view) => element("input", { type: "radio", name: "view", value: view }));
  controls.views.forEach((input) => input.addEventListener("change", () => {
    state.view = input.value;
    show();
  }));
  const labels = controls.views.map((input) => element("label", {}, input, element("span", {}, VIEWS[input.value])));
  return element("div", { className: "views", role: "group" }, ...labels);
}

function filterControls() {
  const search = element("input", { type: "search", id: "search", placeholder: "search in all texts" });
  search.addEventListener("input", () => {
    state.search = search.value;
    show();
  });
  const limits = LIMITS.map((name) => labelled(name, ...["from", "to"].map((end) => {
    const input = element("input", { type: "number", step: "any", placeholder: end, id: `${name}-${end}` });
    input.addEventListener("input", () => {
      state.limits[`${name} ${end}`] = input.value === "" ? null : Number(input.value);
      show();
    });
    return input;
  })));
  const clear = element("button", { type: "button", textContent: "clear" });
  clear.addEventListener("click", () => {
    clearFilters();
    show();
  });
  controls.filters = [search, ...limits.flatMap((label) => [...label.querySelectorAll("input")])];
  return [search, ...limits, clear];
}

function shades() {
  const sample = (className, text) => element("span", { className, textContent: text });
  return element(
    "p", { className: "shades quiet" }, sample("of-logprobs shade-1", "certain"), sample("of-logprobs shade-2", "10 %"),
    sample("of-logprobs shade-3", "below 1 %"), sample("of-ratios shade-low", "half as likely as to the sampler"),
    sample("of-ratios shade-1", "as likely"), sample("of-ratios shade-3", "twice as likely"), sample("read", "read, not sampled"),
  );
}

function openBrowser() {
  stored = parsed("data-completions");
  controls.status = element("p", { className: "status" });
  controls.status.setAttribute("role", "status");
  controls.result = element("div", { className: "result" });
  controls.shades = shades();
  document.getElementById("browser").append(
    element("div", { className: "bar" }, ...stepControls(), viewControls()),
    element("div", { className: "bar" }, ...filterControls()), controls.status, controls.shades, controls.result,
  );
  state.step = stored[0].length - 1;
  show();
}

if (!document.getElementById("completions").hidden) queue.add(openBrowser);
