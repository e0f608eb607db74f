"use strict";
// Everything from the data reaches the page as text nodes or attributes set through the DOM; nothing is parsed as HTML.

const meta = JSON.parse(document.getElementById("meta").textContent);
// JSON has no NaN and no infinity; they come as text.
const index = Object.fromEntries(Object.entries(meta.index).map(([name, column]) => [name, column.map(Number)]));
const sides = ["chosen", "rejected"];
const PAIRS_PER_PAGE = 20;
const views = {
  logratio: { label: "log-ratio", sign: true, unit: "nats", formula: "log policy(token) - log reference(token)" },
  kl: { label: "KL", unit: "nats", formula: "KL(reference || policy) over the whole vocabulary at this position" },
  advantage: { label: "advantage", sign: true, unit: "reward", formula: `${number(meta.scale)} · (log-ratio + KL)` },
  weight: { label: "token weight", unit: "", formula: "weight of the token's log-ratio in the objective" },
};
if (!meta.weighted) delete views.weight;
const state = { view: "logratio", order: [], page: 0, query: "", here: null };
const chunks = new Map();
let words = {}; // texts of tokens by id

// ---- small tools ----

function number(value, digits = 4) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "-" : value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(digits));
}

function percent(p) {
  return p >= 0.0001 || p === 0 ? `${+(100 * p).toPrecision(3)}%` : `${(100 * p).toExponential(1)}%`;
}

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "polyline", "line"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function on(element, event, action) {
  element.addEventListener(event, action);
  return element;
}

// Control characters and those that change the direction of text are shown by their number.
function shown(text) {
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
  return text.replace(hidden, (c) => `⟪${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟫`);
}

// ---- data ----

async function bytesOf(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack(number) {
  const bytes = await bytesOf(`chunk-${number}`);
  let start = 4 + new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, start)));
  const column = (length, Type) => {
    const plane = bytes.subarray(start, (start += 4 * length));
    const rows = new Uint8Array(4 * length);
    for (let i = 0; i < length; i++) for (let k = 0; k < 4; k++) rows[4 * i + k] = plane[k * length + i];
    return new Type(rows.buffer);
  };
  const values = {};
  const ids = column(header.tokens, Uint32Array);
  for (const name of header.columns) values[name] = column(header.tokens, Float32Array);
  const counts = bytes.subarray(start, (start += header.tokens));
  const total = counts.reduce((sum, count) => sum + count, 0);
  const top = { ids: column(total, Uint32Array), policy: column(total, Float32Array), ref: column(total, Float32Array) };
  let token = 0;
  let alternative = 0;
  return header.pairs.map(({ prompt, responses }) => ({
    prompt,
    responses: responses.map(({ pieces, texts, joined }) => Array.from({ length: pieces }, (_, i) => {
      const length = joined[i] ?? 1;
      const sum = (name, weight) => {
        let total = 0;
        for (let k = token; k < token + length; k++) total += values[name][k] * (values[weight]?.[k] ?? 1);
        return total;
      };
      const t = { text: texts[i] ?? words[ids[token]], length, ids: [...ids.subarray(token, token + length)],
        logp: sum("logp"), ref: sum("ref_logp"), kl: sum("kl") };
      t.weight = values.weight?.[token] ?? 1;
      t.klWeight = values.kl_weight?.[token] ?? 1;
      t.logratio = t.logp - t.ref;
      const p = sum("logp", "weight");
      t.share = { r: p - sum("ref_logp", "weight"), k: sum("kl", "kl_weight"), p };
      t.advantage = meta.scale * (t.logratio + t.kl);
      t.top = [];
      for (let k = 0; k < length; k++) {
        for (let n = counts[token + k]; n > 0; n--, alternative++) {
          const entry = { id: top.ids[alternative], policy: top.policy[alternative], ref: top.ref[alternative] };
          if (k === 0) t.top.push(entry);
        }
      }
      token += length;
      return t;
    })),
  }));
}

async function pairData(row) {
  const number = Math.floor(row / meta.chunk);
  if (!chunks.has(number)) chunks.set(number, unpack(number));
  return (await chunks.get(number))[row % meta.chunk];
}

const textOf = (pair) => [pair.prompt, ...pair.responses.map((tokens) => tokens.map((t) => t.text).join(""))].join("\n");

// ---- order, search, pages ----

const sorts = {
  data: ["order in the data", (row) => row],
  loss: ["loss, highest first", (row) => -index.loss[row]],
  margin: ["margin, lowest first", (row) => index.chosen_reward[row] - index.rejected_reward[row]],
  kl: ["sequential KL, highest first", (row) => -(index.k_w[row] + index.k_l[row])],
  largest: ["KL of a single token, highest first", (row) => -index.largest_kl[row]],
};

// Pairs whose value is not a number come first: something is wrong with them.
function order(a, b) {
  return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(b) - Number.isNaN(a) : a - b;
}

async function arrange() {
  const query = state.query.trim().toLowerCase();
  const status = document.getElementById("status");
  let rows = index.loss.map((_, row) => row);
  if (/^#\d+$/.test(query)) {
    rows = rows.filter((row) => index.row[row] === Number(query.slice(1)));
  } else if (query) {
    status.textContent = "searching";
    const found = [];
    for (const row of rows) if (textOf(await pairData(row)).toLowerCase().includes(query)) found.push(row);
    if (query !== state.query.trim().toLowerCase()) return; // typed on meanwhile
    rows = found;
  }
  const key = sorts[document.getElementById("sort").value][1];
  const keys = new Map(rows.map((row) => [row, key(row)]));
  state.order = rows.sort((a, b) => order(keys.get(a), keys.get(b)) || a - b);
  state.page = 0;
  await draw();
}

function pageCount() {
  return Math.max(1, Math.ceil(state.order.length / PAIRS_PER_PAGE));
}

async function turn(by) {
  const page = Math.min(Math.max(state.page + by, 0), pageCount() - 1);
  if (page === state.page) return;
  state.page = page;
  await draw();
  document.querySelector("main").scrollIntoView();
}

async function draw() {
  const first = state.page * PAIRS_PER_PAGE;
  const rows = state.order.slice(first, first + PAIRS_PER_PAGE);
  const data = await Promise.all(rows.map(pairData));
  document.getElementById("pairs").replaceChildren(...rows.map((row, i) => article(row, data[i])));
  const total = state.order.length;
  document.getElementById("status").textContent = total
    ? `pairs ${first + 1} to ${first + rows.length} of ${total.toLocaleString("en")}` : "no pair matches";
  for (const nav of document.querySelectorAll(".pages")) {
    nav.replaceChildren(
      on(make("button", { type: "button", disabled: state.page === 0 }, "previous"), "click", () => turn(-1)),
      make("span", {}, `page ${state.page + 1} of ${pageCount()}`),
      on(make("button", { type: "button", disabled: state.page + 1 >= pageCount() }, "next"), "click", () => turn(1)),
    );
  }
  state.here = null;
  paint();
}

// ---- a pair ----

function article(row, pair) {
  const margin = index.chosen_reward[row] - index.rejected_reward[row];
  const where = index.row[row] ? `row ${index.row[row]}` : `pair ${row + 1}`;
  const numbers = `loss ${number(index.loss[row])} · margin ${number(margin)} · sequential KL chosen ` +
    `${number(index.k_w[row])}, rejected ${number(index.k_l[row])} · largest at one token ${number(index.largest_kl[row])}`;
  const prompt = make("p", { class: "text", dir: "auto" }, shown(pair.prompt));
  const element = make("article", { "data-row": row, "aria-label": where },
    make("h2", {}, where), make("p", { class: "numbers" }, numbers),
    make("details", { open: pair.prompt.length < 600 }, make("summary", {}, "prompt"), prompt),
    make("div", { class: "sides" }, ...pair.responses.map((tokens, side) => response(row, side, tokens))),
    make("p", { class: "numbers sums" }), make("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none",
      role: "img" }));
  element.tokens = pair.responses;
  return element;
}

function response(row, side, tokens) {
  const name = sides[side];
  const letter = "wl"[side];
  const count = index[`n_${letter}`][row];
  const list = make("p", { class: "text response", dir: "auto", role: "listbox",
    "aria-label": `tokens of the ${name} response` });
  tokens.forEach((t, i) => {
    const blank = t.text.trim() === "" ? (t.text.includes("\n") ? "line break" : t.text ? "space" : "empty") : undefined;
    const element = make("span", { class: "t", role: "option", "aria-selected": "false", "aria-label": blank,
      tabindex: i ? -1 : 0 });
    const parts = t.text === "" ? ["∅"] : shown(t.text).split(/(\n)/);
    for (const part of parts) {
      if (part === "\n") element.append(make("span", { class: "mark", "aria-hidden": "true" }, "↵"));
      element.append(part);
    }
    element.place = { row, side, i };
    list.append(element);
  });
  const numbers = `${count} tokens · log-ratio ${number(index[`r_${letter}`][row])} · reward ` +
    number(index[`${name}_reward`][row]);
  return make("section", {}, make("h3", {}, name), make("p", { class: "numbers" }, numbers), list);
}

// Colours of all tokens on the page and the running sums, under the current view.
function paint() {
  const view = views[state.view];
  const scale = meta.scales[state.view] || 1;
  const root = document.documentElement.style;
  const hue = { kl: "var(--kl)", weight: "var(--weight)" }[state.view];
  root.setProperty("--low", view.sign ? "var(--minus)" : "transparent");
  root.setProperty("--high", hue || "var(--plus)");
  root.setProperty("--zero", view.sign ? "50%" : "0%");
  const range = view.sign ? `${number(-scale, 2)} to ${number(scale, 2)}` : `0 to ${number(scale, 2)}`;
  document.getElementById("scale").textContent = `${range} ${view.unit}; ${view.formula}`;
  for (const element of document.querySelectorAll("article")) {
    const lists = element.querySelectorAll(".response");
    element.tokens.forEach((tokens, side) => tokens.forEach((t, i) => {
      const style = lists[side].children[i].style;
      const strength = Math.min(Math.abs(t[state.view]) / scale, 1);
      style.setProperty("--v", (Number.isNaN(strength) ? 1 : strength).toFixed(3));
      style.setProperty("--hue", hue || (t[state.view] < 0 ? "var(--minus)" : "var(--plus)"));
    }));
    drawSums(element);
  }
}

function drawSums(element) {
  const sums = element.tokens.map((tokens) => {
    let sum = 0;
    return [0, ...tokens.map((t) => (sum += t[state.view]))];
  });
  const all = sums.flat().filter(Number.isFinite);
  const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
  const y = (value) => 96 - (92 * (value - low)) / (high - low || 1);
  const longest = Math.max(...sums.map((side) => side.length - 1), 1);
  element.x = (i) => (1000 * i) / longest;
  const finite = (side) => side.findIndex((value) => !Number.isFinite(value));
  const points = (side) => side.slice(0, finite(side) < 0 ? side.length : finite(side))
    .map((value, i) => `${element.x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const svg = element.querySelector("svg");
  svg.replaceChildren(
    make("line", { x1: 0, x2: 1000, y1: y(0), y2: y(0) }),
    ...sums.map((side, i) => make("polyline", { class: sides[i], points: points(side) })),
  );
  const row = Number(element.dataset.row);
  const ends = sums.map((side, i) => {
    const [r, k] = ["r", "k"].map((name) => index[`${name}_${"wl"[i]}`][row]);
    const exact = { logratio: r, kl: k, advantage: meta.scale * (r + k) };
    return number(exact[state.view] ?? side[side.length - 1]);
  });
  const text = `running sum of ${views[state.view].label}: chosen (solid) ${ends[0]}, rejected (dashed) ${ends[1]}`;
  element.querySelector(".sums").textContent = text;
  svg.setAttribute("aria-label", text);
}

// ---- the token panel ----

function show(element, focus) {
  const { row, side, i } = element.place;
  const pair = element.closest("article");
  const t = pair.tokens[side][i];
  if (state.here) {
    state.here.classList.remove("on");
    state.here.setAttribute("aria-selected", "false");
    state.here.closest("article").querySelector("line.here")?.remove();
  }
  state.here = element;
  element.classList.add("on");
  element.setAttribute("aria-selected", "true");
  for (const other of element.parentNode.children) other.tabIndex = other === element ? 0 : -1;
  if (focus) element.focus();
  pair.querySelector("svg").append(make("line", { class: "here", x1: pair.x(i + 1), x2: pair.x(i + 1), y1: 0, y2: 100 }));

  const joined = t.length > 1 ? `, ${t.length} tokens of one character` : "";
  const close = on(make("button", { type: "button", class: "close", "aria-label": "close" }, "×"), "click", hide);
  const rows = [
    ["probability, policy", percent(Math.exp(t.logp))], ["probability, reference", percent(Math.exp(t.ref))],
    ["log-ratio, nats", number(t.logratio)], ["KL(reference || policy), nats", number(t.kl)],
    ["advantage", number(t.advantage)],
    ...(meta.weighted ? [["weights of log-ratio, KL", `${number(t.weight)}, ${number(t.klWeight)}`]] : []),
  ].map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, value)));
  document.getElementById("token").replaceChildren(
    make("h2", {}, make("span", {}, `token ${i + 1} of ${sides[side]}`), close),
    make("p", {}, make("span", { class: "piece", dir: "auto" }, shown(t.text) || "∅"), ` id ${t.ids.join(", ")}${joined}`),
    make("table", {}, make("tbody", {}, ...rows)),
    make("h3", {}, "most likely here"), alternatives(t),
    make("h3", {}, `loss of this pair, ${meta.objective}`), ...lossOf(row, side, t),
  );
  document.getElementById("token").classList.add("open");
  document.body.classList.add("reading");
}

function hide() {
  document.getElementById("token").classList.remove("open");
  document.body.classList.remove("reading");
}

function alternatives(t) {
  if (!t.top.length) return make("p", { class: "hint" }, "left out of this page to keep it small; see --max_pairs");
  const unique = [...new Map(t.top.map((entry) => [entry.id, entry])).values()];
  const body = unique.sort((a, b) => b.policy + b.ref - a.policy - a.ref).map((entry) =>
    make("tr", { class: entry.id === t.ids[0] ? "label" : undefined }, make("td", { dir: "auto" }, shown(words[entry.id]) || "∅"),
      make("td", {}, percent(entry.policy)), make("td", {}, percent(entry.ref))));
  const head = make("tr", {}, ...["token", "policy", "reference"].map((name) => make("th", { scope: "col" }, name)));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

// The loss with symbols, and with numbers: sums that this token belongs to are split into the rest and its share.
function lossOf(row, side, t) {
  const result = `${number(index.loss[row], 5)} nats`;
  if (!meta.equation) return [make("p", { class: "equation" }, `= ${result}`)];
  const letter = "wl"[side];
  const share = Object.fromEntries(Object.entries(t.share).map(([name, value]) => [`${name}_${letter}`, value]));
  const sum = (name) => (index[`${name}_weighted`] ?? index[name])[row];
  const symbols = make("p", { class: "equation" });
  const filled = make("p", { class: "equation filled" });
  const signed = (value) => (value < 0 ? `(${number(value, 5)})` : number(value, 5));
  for (const part of meta.equation.split(/([A-Za-z_]+)/)) {
    const plain = part.replaceAll(" ** 2", "²").replaceAll("*", "·");
    if (part === "sigmoid") {
      for (const line of [symbols, filled]) line.append("σ");
    } else if (part in share) {
      const [name, sub] = part.split("_");
      symbols.append(make("mark", {}, name, make("sub", {}, sub)));
      filled.append(`(${number(sum(part) - share[part], 5)} + `, make("mark", {}, signed(share[part])), ")");
    } else if (/^[rkpn]_[wl]$/.test(part)) {
      const [name, sub] = part.split("_");
      symbols.append(name, make("sub", {}, sub));
      filled.append(signed(sum(part)));
    } else if (part in meta.parameters) {
      symbols.append(part);
      filled.append(signed(meta.parameters[part]));
    } else {
      for (const line of [symbols, filled]) line.append(plain);
    }
  }
  filled.append(` = ${result}`);
  const note = "r: log-ratio, k: sequential KL, w: chosen, l: rejected; this token's share is marked";
  return [symbols, filled, make("p", { class: "hint" }, note)];
}

// ---- controls ----

function setView(name) {
  state.view = name;
  document.querySelector(`input[name="view"][value="${name}"]`).checked = true;
  paint();
}

function setTheme(name) {
  const dark = name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

async function start() {
  words = JSON.parse(new TextDecoder().decode(await bytesOf("words")));
  const about = `${meta.objective} · policy ${meta.policy} · reference ${meta.reference} · ${meta.dataset}`;
  document.getElementById("about").textContent = about;
  document.getElementById("view-count").textContent = Object.keys(views).length;
  Object.entries(views).forEach(([name, view]) => {
    const input = make("input", { type: "radio", name: "view", value: name });
    document.getElementById("views").append(make("label", {}, on(input, "change", () => setView(name)), ` ${view.label}`));
  });
  const sort = document.getElementById("sort");
  sort.append(...Object.entries(sorts).map(([name, [label]]) => make("option", { value: name }, label)));
  on(sort, "change", arrange);
  on(document.getElementById("search"), "input", (event) => {
    state.query = event.target.value;
    arrange();
  });
  on(document.getElementById("controls"), "submit", (event) => event.preventDefault());
  const theme = document.getElementById("theme");
  on(theme, "change", () => setTheme(theme.value));
  on(matchMedia("(prefers-color-scheme: dark)"), "change", () => setTheme(theme.value));
  setTheme("");
  const tokenOf = (event) => event.target.closest?.(".t");
  const pairs = document.getElementById("pairs");
  for (const kind of ["pointerover", "focusin", "click"]) {
    on(pairs, kind, (event) => tokenOf(event) && tokenOf(event) !== state.here && show(tokenOf(event), kind === "click"));
  }
  on(document, "keydown", keys);
  setView("logratio");
  arrange();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return hide();
  if (["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "radio") return undefined;
  const token = event.target.closest?.(".t");
  const target = token && { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
    ArrowDown: token.nextElementSibling, ArrowUp: token.previousElementSibling,
    Home: token.parentNode.firstElementChild, End: token.parentNode.lastElementChild }[event.key];
  if (target) {
    event.preventDefault();
    show(target, true);
  } else if (event.key === "/") {
    event.preventDefault();
    document.getElementById("search").focus();
  } else if (event.key === "n" || event.key === "p") {
    turn(event.key === "n" ? 1 : -1);
  } else if (Object.keys(views)[Number(event.key) - 1]) {
    setView(Object.keys(views)[Number(event.key) - 1]);
  }
  return undefined;
}

if (typeof DecompressionStream === "undefined") {
  document.getElementById("status").textContent = "this browser is too old to unpack the page (no DecompressionStream)";
} else {
  start();
}
