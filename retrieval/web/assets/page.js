// The page's behaviour: the state is in the address, every answer comes from /api/search.

import { describe, search as ask, useToken } from "./api.js";
import { comparisons, drawComparisons, drawLegs, drawReleases, drawSure, drawTabs, entityOf, hasProbability, markTab, typesOf } from "./controls.js";
import { openDetails } from "./details.js";
import { $, element, ms } from "./dom.js";
import { drawStages, factsOf, say } from "./facts.js";
import { drawChips, drawFacets, filterExpression } from "./filters.js";
import { hasPicture, hitItem } from "./hits.js";
import { listenToKeys } from "./keys.js";
import { FIRST_K, MOST_K, readAddress, state, writeAddress } from "./state.js";

const TYPING_MS = 60;

let release = null;
let running = null;
let timer = 0;
let asked = 0;

const entity = () => entityOf(release, state.type);

// ---- drawing ------------------------------------------------------------------------------------

function showHit(hit, weights) {
  if (state.type === "query") askText(hit.title);
  else openDetails(hit, weights, askText);
}

function drawColumn(id, page, isList, ranks) {
  const options = { column: id, weights: page.weights, isList, ranks, onOpen: showHit };
  $(id).replaceChildren(...page.hits.map((hit, i) => hitItem(hit, i + 1, options)));
  $(id).className = isList ? "list" : "grid";
}

const ranksOf = (page) => new Map(page.hits.map((hit, i) => [hit.id, i + 1]));

function drawAnswers(page, other) {
  const pictures = page.hits.filter(hasPicture).length;
  const suitsList = pictures < page.hits.length / 2;
  const isList = Boolean(other) || (state.view ? state.view === "list" : suitsList);
  drawColumn("results", page, isList, other && ranksOf(other));
  $("others-side").hidden = !other;
  $("results-name").hidden = !other;
  $("columns").classList.toggle("two", Boolean(other));
  if (other) {
    drawColumn("others", other, true, ranksOf(page));
    const name = comparisons(release, entity()).find(([value]) => value === state.versus)[1];
    $("results-name").textContent = `This search · ${ms(page.timings.total_ns)}`;
    $("others-name").textContent = `${name} · ${ms(other.timings.total_ns)}`;
  } else {
    $("others").replaceChildren();
  }
  $("view").setAttribute("aria-pressed", String(isList));
  $("view").disabled = Boolean(other);
  $("more-hits").hidden = page.hits.length < state.k || state.k >= MOST_K;
}

function drawStatus(page, other) {
  const count = page.hits.length;
  const texts = [`${count} ${count === 1 ? "result" : "results"} in ${ms(page.timings.total_ns)}`];
  if (other) {
    const ranks = ranksOf(other);
    texts.push(`${page.hits.filter((hit) => ranks.has(hit.id)).length} of them in both`);
  }
  say(texts.join(", "));
  $("facts").replaceChildren(...factsOf(page, entity()));
  drawStages(page.timings);
  $("release-name").textContent = `release ${page.release_id} · space ${page.space_id.slice(0, 12)}`;
}

function clear() {
  for (const id of ["results", "others", "facts", "facets"]) $(id).replaceChildren();
  for (const id of ["stages", "more-hits", "others-side", "results-name"]) $(id).hidden = true;
}

function drawControls() {
  drawLegs(entity(), () => search(true));
  drawComparisons(release, entity());
  drawSure(entity());
  drawChips(() => search(true));
  $("exact").checked = state.exact;
  $("where").value = state.where;
}

// How long a key press took until its answer was on the screen.
function measurePaint(since) {
  requestAnimationFrame(() => setTimeout(() => {
    performance.clearMeasures("answer");
    const { duration } = performance.measure("answer", { start: since, end: performance.now() });
    $("painted").textContent = `on screen after ${duration.toFixed(0)} ms`;
  }));
}

// ---- searching ----------------------------------------------------------------------------------

function setBusy(isBusy) {
  $("panel").classList.toggle("busy", isBusy);
  $("panel").setAttribute("aria-busy", String(isBusy));
}

function failed(error) {
  clear();
  say(error.status ? error.message : "The server does not answer. Is it running?", true);
  $("token-form").hidden = error.status !== 401;
  if (error.status === 401) $("token").focus();
}

// A bound on the probability is asked for only of answers that have one.
const withSure = (other) => ({ ...other, sure: hasProbability(entity(), other.legs ?? state.legs) ? state.sure : "" });

async function search(push = false) {
  clearTimeout(timer);
  timer = 0;
  running?.abort();
  if (!release) return;
  const since = asked || performance.now();
  asked = 0;
  drawControls();
  writeAddress(typesOf(release)[0], push);
  const text = state.q.trim();
  document.title = text ? `${text} · OmniSearchSage` : "OmniSearchSage";
  $("empty").hidden = Boolean(text);
  $("tools").hidden = !text;
  if (!text) {
    clear();
    say("");
    return;
  }
  const mine = (running = new AbortController());
  setBusy(true);
  try {
    const filter = filterExpression(entity()?.attributes || {});
    const versus = comparisons(release, entity()).find(([value]) => value === state.versus);
    const [page, other] = await Promise.all([
      ask(state, filter, withSure({}), mine.signal),
      versus && ask(state, filter, withSure(versus[2]), mine.signal),
    ]);
    if (mine !== running) return;
    drawAnswers(page, other);
    measurePaint(since);
    drawStatus(page, other);
    drawFacets(page.hits, entity()?.attributes || {}, () => search(true));
    $("token-form").hidden = true;
  } catch (error) {
    if (error.name === "AbortError" || mine !== running) return;
    failed(error);
  } finally {
    if (mine === running) setBusy(false);
  }
}

function askText(text) {
  $("query").value = state.q = text;
  state.filters = [];
  search(true);
  $("query").focus();
}

function choose(type) {
  if (type === state.type) return;
  Object.assign(state, { type, filters: [], where: "", k: FIRST_K, legs: "" });
  markTab();
  search(true);
}

// ---- listening ----------------------------------------------------------------------------------

// The first key is answered at once; what is typed on quickly, when it pauses for a moment.
function typed(event) {
  state.q = $("query").value;
  state.k = FIRST_K;
  const isFirst = !timer && !$("panel").classList.contains("busy");
  asked = event.timeStamp;
  clearTimeout(timer);
  if (isFirst) search();
  timer = setTimeout(() => {
    timer = 0;
    if (!isFirst) search();
  }, TYPING_MS);
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.q = $("query").value;
    search(true);
  });
  $("query").addEventListener("input", typed);
  $("exact").addEventListener("change", () => {
    state.exact = $("exact").checked;
    search(true);
  });
  $("versus").addEventListener("change", () => {
    state.versus = $("versus").value;
    search(true);
  });
  $("sure").addEventListener("change", () => {
    state.sure = $("sure").value;
    search(true);
  });
  $("release").addEventListener("change", () => {
    state.release = $("release").value;
    start(true);
  });
  $("view").addEventListener("click", () => {
    state.view = $("view").getAttribute("aria-pressed") === "true" ? "grid" : "list";
    search(true);
  });
  $("more-hits").addEventListener("click", () => {
    state.k = Math.min(MOST_K, 2 * state.k);
    search(true);
  });
  $("where-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.where = $("where").value.trim();
    search(true);
  });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useToken($("token").value);
    start();
  });
  window.addEventListener("popstate", () => {
    const before = state.release;
    readAddress();
    $("query").value = state.q;
    if (state.release !== before) start();
    else if (release) {
      drawTabs(release, choose);
      search();
    }
  });
  listenToKeys();
}

async function start(push = false) {
  try {
    release = await describe(state.release);
  } catch (error) {
    failed(error);
    return;
  }
  $("token-form").hidden = true;
  $("release-name").textContent = `release ${release.release_id} · space ${release.space_id.slice(0, 12)}`;
  $("samples").replaceChildren(...release.samples.map((text) => {
    const button = element("button", { type: "button", textContent: text, dir: "auto" });
    button.addEventListener("click", () => askText(text));
    return button;
  }));
  $("samples-hint").hidden = !release.samples.length;
  drawTabs(release, choose);
  drawReleases(release);
  search(push);
}

readAddress();
$("query").value = state.q;
$("filters").open = matchMedia("(min-width: 761px)").matches;
listen();
start();
