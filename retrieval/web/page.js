// The page's behaviour: state lives in the address (q, type, exact), every answer is drawn from /api/search, all text goes in as text.
"use strict";

const NAMES = { pin: "Pins", product: "Products", query: "Queries", ad: "Ads" };
const ORDER = ["pin", "product", "query", "ad"];
const SAMPLES = ["happy birthday", "Weihnachten", "música", "鳥", "любовь", "ocean animal", "نجمة", "coffee"];
const TYPING_MS = 180;
const K = 24;

const $ = (id) => document.getElementById(id);
const state = { q: "", type: "pin", exact: false };
let release = null;
let running = null;
let timer = 0;

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

async function get(path, signal) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { headers, signal });
  const body = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(body.error || `HTTP ${response.status}`), { status: response.status });
  return body;
}

function readAddress() {
  const given = new URLSearchParams(location.search);
  state.q = given.get("q") || "";
  state.type = given.get("type") || "pin";
  state.exact = given.get("exact") === "1";
}

function writeAddress(push) {
  const wanted = new URLSearchParams();
  if (state.q) wanted.set("q", state.q);
  if (state.type !== "pin") wanted.set("type", state.type);
  if (state.exact) wanted.set("exact", "1");
  const address = wanted.size ? `?${wanted}` : location.pathname;
  if (push && address !== location.search) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

function drawTabs() {
  const types = release.entities.map((e) => e.entity_type);
  types.sort((a, b) => (ORDER.indexOf(a) + 9) % 9 - (ORDER.indexOf(b) + 9) % 9);
  if (!types.includes(state.type)) state.type = types[0];
  $("tabs").replaceChildren(...types.map((type) => {
    const entity = release.entities.find((e) => e.entity_type === type);
    const count = element("small", { textContent: Number(entity.count).toLocaleString("en") });
    const tab = element("button", { type: "button", id: `tab-${type}` }, NAMES[type] || type, count);
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "results");
    tab.dataset.type = type;
    tab.addEventListener("click", () => choose(type));
    return tab;
  }));
  markTab();
}

function markTab() {
  for (const tab of $("tabs").children) {
    const selected = tab.dataset.type === state.type;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    if (selected) $("results").setAttribute("aria-labelledby", tab.id);
  }
}

function choose(type) {
  if (type === state.type) return;
  state.type = type;
  markTab();
  search(true);
}

function picture(hit) {
  if (hit.picture) {
    const photo = !hit.picture.startsWith("api/");
    const image = element("img", { src: hit.picture, alt: "", loading: "lazy", className: photo ? "photo" : state.type === "pin" ? "" : "plain" });
    image.addEventListener("error", () => image.replaceWith(hit.character || "◌"), { once: true });
    return image;
  }
  return hit.character || "◌";
}

function card(hit, rank) {
  const meter = element("meter", { min: 0, max: 1, value: Math.max(0, hit.score) });
  meter.setAttribute("aria-hidden", "true");
  const text = element("span", { className: "text" },
    element("b", { textContent: hit.title, dir: "auto" }),
    element("span", { className: "score" }, element("span", { textContent: hit.score.toFixed(3) }), meter));
  if (hit.missed_by_graph) text.append(element("span", { className: "missed", textContent: "missed by the graph" }));
  const button = element("button", { type: "button", className: "card" });
  if (state.type !== "query") button.append(element("figure", {}, picture(hit)));
  button.append(text);
  button.setAttribute("aria-label", `${rank}. ${hit.title}, score ${hit.score.toFixed(3)}${hit.missed_by_graph ? ", missed by the graph" : ""}`);
  button.addEventListener("click", () => (state.type === "query" ? ask(hit.title) : show(hit)));
  return element("li", {}, button);
}

const ms = (ns) => (ns / 1e6 < 10 ? (ns / 1e6).toFixed(2) : (ns / 1e6).toFixed(0)) + " ms";
const percent = (share) => `${(100 * share).toFixed(1)}%`;

function fact(text, kind = "") {
  return element("li", { textContent: text, className: kind });
}

function drawFacts(page) {
  const entity = release && release.entities.find((e) => e.entity_type === state.type);
  const facts = [page.cache_hit ? fact("cache hit", "good") : fact("encoded now")];
  if (page.graph) {
    const { found, of } = page.graph;
    facts.push(fact(`graph finds ${found} of these ${of}`, found < of ? "warn" : "good"));
    facts.push(fact(`exact ${ms(page.timings.search_ns)}, graph ${ms(page.graph.timings.search_ns)}`));
  } else {
    facts.push(fact(page.ef ? `${page.plan}, ef ${page.ef}` : page.plan));
    if (page.estimated_recall !== null) facts.push(fact(`expected recall ${percent(page.estimated_recall)}`, "good"));
  }
  if (entity && entity.ann_recall_at_10 !== null) facts.push(fact(`measured ANN recall@10 ${percent(entity.ann_recall_at_10)} (${entity.index_kind})`));
  $("facts").replaceChildren(...facts);
  const t = page.timings;
  const parts = [["queue", t.queue_ns], ["encode", t.encode_ns], ["search", t.search_ns]];
  parts.push(["rest", Math.max(0, t.total_ns - t.queue_ns - t.encode_ns - t.search_ns)]);
  $("stages").replaceChildren(...parts.filter(([, ns]) => ns > 0).map(([name, ns]) => {
    const bar = element("i", { className: name });
    bar.style.flexGrow = ns;
    return bar;
  }));
  const words = parts.map(([name, ns]) => `${name} ${ms(ns)}`).join(", ");
  $("stages").setAttribute("aria-label", `Stage timings: ${words}`);
  $("stages").title = words;
  $("stages").hidden = false;
}

function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

function clear() {
  $("results").replaceChildren();
  $("facts").replaceChildren();
  $("stages").hidden = true;
}

async function search(push = false) {
  clearTimeout(timer);
  if (running) running.abort();
  writeAddress(push);
  document.title = state.q ? `${state.q} · OmniSearchSage` : "OmniSearchSage";
  $("empty").hidden = Boolean(state.q.trim());
  $("results").className = state.type === "query" ? "queries" : "";
  if (!state.q.trim()) {
    clear();
    say("");
    return;
  }
  const mine = (running = new AbortController());
  $("results").classList.add("busy");
  $("results").setAttribute("aria-busy", "true");
  const wanted = new URLSearchParams({ q: state.q, type: state.type, k: K, exact: state.exact ? "1" : "0" });
  try {
    const page = await get(`api/search?${wanted}`, mine.signal);
    if (mine !== running) return;
    $("results").replaceChildren(...page.hits.map((hit, i) => card(hit, i + 1)));
    const count = page.hits.length;
    say(`${count} ${count === 1 ? "result" : "results"} in ${ms(page.timings.total_ns)}`);
    drawFacts(page);
    $("release").textContent = `release ${page.release_id} · space ${page.space_id.slice(0, 12)}`;
    $("token-form").hidden = true;
  } catch (error) {
    if (error.name === "AbortError" || mine !== running) return;
    failed(error);
  } finally {
    if (mine === running) {
      $("results").classList.remove("busy");
      $("results").setAttribute("aria-busy", "false");
    }
  }
}

function failed(error) {
  clear();
  say(error.status ? error.message : "The server does not answer.", true);
  $("token-form").hidden = error.status !== 401;
  if (error.status === 401) $("token").focus();
}

function ask(text) {
  $("query").value = state.q = text;
  search(true);
  $("query").focus();
}

function show(hit) {
  $("details-picture").replaceChildren(picture(hit));
  $("details-title").textContent = hit.title;
  $("details-score").textContent = `${hit.id} · cosine ${hit.score.toFixed(4)}`;
  const rows = Object.entries(hit.attributes).filter(([name]) => name !== "title");
  $("details-attributes").replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", { textContent: name.replaceAll("_", " ") }),
    element("dd", { textContent: Array.isArray(value) ? value.join(", ") : String(value), dir: "auto" }),
  ]));
  $("more").onclick = () => { $("details").close(); ask(hit.title); };
  $("details").showModal();
}

// Arrow keys walk the grid by what is seen, whatever number of columns fits.
function moveInGrid(key) {
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (at < 0) return false;
  const columns = Math.max(1, cards.findIndex((c) => c.offsetTop > cards[0].offsetTop));
  const perRow = cards.some((c) => c.offsetTop > cards[0].offsetTop) ? columns : cards.length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow }[key];
  if (at + step < 0) $("query").focus();
  else cards[Math.min(at + step, cards.length - 1)].focus();
  return true;
}

function moveInTabs(key) {
  const tabs = [...$("tabs").children];
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[key];
  if (at < 0 || to === undefined) return false;
  const tab = tabs[(to + tabs.length) % tabs.length];
  tab.focus();
  choose(tab.dataset.type);
  return true;
}

document.addEventListener("keydown", (event) => {
  if ($("details").open) return;
  const typing = event.target.matches("input:not([type=checkbox])");
  if (event.altKey && event.code === "KeyE") {
    $("exact").click();
  } else if (event.altKey && /^Digit[1-9]$/.test(event.code)) {
    const tab = $("tabs").children[Number(event.code.slice(5)) - 1];
    if (tab) choose(tab.dataset.type);
  } else if (event.key === "/" && !typing) {
    $("query").focus();
    $("query").select();
  } else if (event.key === "ArrowDown" && event.target === $("query")) {
    const first = document.querySelector(".card");
    if (first) first.focus();
  } else if (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End") {
    if (typing || !(moveInTabs(event.key) || (event.key.startsWith("Arrow") && moveInGrid(event.key)))) return;
  } else {
    return;
  }
  event.preventDefault();
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.q = $("query").value;
  search(true);
});
$("query").addEventListener("input", () => {
  state.q = $("query").value;
  clearTimeout(timer);
  timer = setTimeout(search, TYPING_MS);
});
$("exact").addEventListener("change", () => {
  state.exact = $("exact").checked;
  search(true);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  start();
});
window.addEventListener("popstate", () => {
  readAddress();
  $("query").value = state.q;
  $("exact").checked = state.exact;
  markTab();
  search();
});

async function start() {
  readAddress();
  $("query").value = state.q;
  $("exact").checked = state.exact;
  $("samples").replaceChildren(...SAMPLES.map((text) => {
    const button = element("button", { type: "button", textContent: text, dir: "auto" });
    button.addEventListener("click", () => ask(text));
    return button;
  }));
  try {
    release = await get("api/describe");
    $("release").textContent = `release ${release.release_id} · space ${release.space_id.slice(0, 12)}`;
    $("token-form").hidden = true;
    drawTabs();
    search();
  } catch (error) {
    failed(error);
  }
}

start();
