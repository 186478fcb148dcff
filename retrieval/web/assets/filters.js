// Filters from the attributes of the hits that are shown: facets with counts, and chips to take off.

import { $, element, label } from "./dom.js";
import { state } from "./state.js";

const MOST_FACETS = 8;
const MOST_VALUES = 6;
const LONG = 40;
const NO_FACETS = new Set(["title", "query", "image", "character", "url", "link", "description", "caption", "engaged_queries"]);
const LANGUAGES = new Set(["language", "lang", "locale"]);

const RANGE = /^([\d.e+-]*)\.\.([\d.e+-]*)$/;

const quoted = (text) => JSON.stringify(text).replaceAll("\\b", "\\u0008").replaceAll("\\f", "\\u000c");
const isNumber = (type) => type === "int" || type === "float";

// One condition in the language of filters (docs/reference/filters.md).
export function condition(field, value, type) {
  const inner = type.startsWith("list<") ? type.slice(5, -1) : type;
  const range = isNumber(type) && RANGE.exec(value);
  if (range) {
    const bounds = [range[1] && `${field} >= ${range[1]}`, range[2] && `${field} < ${range[2]}`];
    return bounds.filter(Boolean).join(" and ");
  }
  const literal = inner === "string" || inner === "time" ? quoted(value) : value;
  return type === inner ? `${field} == ${literal}` : `array_contains(${field}, ${literal})`;
}

// All that is chosen: values of one attribute are alternatives, attributes hold together.
export function filterExpression(types) {
  const byField = new Map();
  for (const { field, value } of state.filters) {
    const type = types[field];
    if (type) byField.set(field, [...(byField.get(field) || []), `(${condition(field, value, type)})`]);
  }
  const parts = [...byField.values()].map((conditions) => (conditions.length > 1 ? `(${conditions.join(" or ")})` : conditions[0]));
  if (state.where) parts.push(`(${state.where})`);
  return parts.join(" and ");
}

function languageName(code) {
  try {
    return new Intl.DisplayNames(["en"], { type: "language" }).of(code) || code;
  } catch {
    return code;
  }
}

export function valueName(field, value) {
  if (LANGUAGES.has(field)) return languageName(value);
  const range = RANGE.exec(value);
  if (!range) return value === "true" ? "yes" : value === "false" ? "no" : value;
  if (!range[1]) return `below ${range[2]}`;
  return range[2] ? `${range[1]} to ${range[2]}` : `${range[1]} and more`;
}

// Cuts numbers into about four ranges with round borders.
function ranges(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const step = 10 ** Math.floor(Math.log10((sorted.at(-1) - sorted[0]) / 4));
  const borders = [0.25, 0.5, 0.75].map((share) => Math.round(sorted[Math.floor(share * sorted.length)] / step) * step);
  const distinct = [...new Set(borders.map((border) => Number(border.toPrecision(6))))].filter((border) => border > sorted[0]);
  const edges = ["", ...distinct, ""];
  return edges.slice(1).map((high, i) => {
    const low = edges[i];
    const count = sorted.filter((n) => (low === "" || n >= low) && (high === "" || n < high)).length;
    return [`${low}..${high}`, count];
  });
}

function countsOf(values, type) {
  const counts = new Map();
  for (const value of values) counts.set(String(value), (counts.get(String(value)) || 0) + 1);
  if (isNumber(type) && counts.size > MOST_VALUES) return ranges(values.map(Number).filter(Number.isFinite));
  const entries = [...counts].sort((a, b) => b[1] - a[1]);
  const longest = entries.length ? Math.max(...entries.map(([text]) => text.length)) : 0;
  const repeats = entries.some(([, count]) => count > 1);
  return longest > LONG || !repeats ? [] : entries.slice(0, MOST_VALUES);
}

// Facets: attribute -> [value, count] of the hits, languages first.
export function facetsOf(hits, types) {
  const names = Object.keys(types).filter((name) => !NO_FACETS.has(name) && !types[name].includes("time"));
  names.sort((a, b) => LANGUAGES.has(b) - LANGUAGES.has(a));
  const facets = new Map();
  for (const name of names) {
    const values = hits.flatMap((hit) => (hit.attributes[name] === undefined ? [] : hit.attributes[name]));
    const counts = countsOf(values, types[name]);
    const tellsApart = counts.length > 1 || (counts.length && counts[0][1] < hits.length);
    if (tellsApart) facets.set(name, counts);
  }
  return facets;
}

const isChosen = (field, value) => state.filters.some((chosen) => chosen.field === field && chosen.value === value);

export function toggleFilter(field, value) {
  const without = state.filters.filter((chosen) => chosen.field !== field || chosen.value !== value);
  if (without.length === state.filters.length) without.push({ field, value });
  state.filters = without;
}

// Values that were there before an attribute was filtered by; they stay to be chosen, too.
let remembered = { key: "", facets: new Map() };

function withRemembered(facets) {
  const key = `${state.type} ${state.q} ${state.release}`;
  if (remembered.key !== key) remembered = { key, facets: new Map() };
  const shown = new Map(facets);
  for (const { field } of state.filters) {
    const known = new Map(facets.get(field) || []);
    for (const [value] of remembered.facets.get(field) || []) if (!known.has(value)) known.set(value, null);
    for (const chosen of state.filters) if (chosen.field === field && !known.has(chosen.value)) known.set(chosen.value, 0);
    shown.set(field, [...known]);
  }
  for (const [field, counts] of facets) if (!state.filters.some((chosen) => chosen.field === field)) remembered.facets.set(field, counts);
  return shown;
}

function facet(field, counts, onChange) {
  const options = counts.map(([value, count]) => {
    const box = element("input", { type: "checkbox", checked: isChosen(field, value) });
    box.addEventListener("change", () => {
      toggleFilter(field, value);
      onChange();
    });
    const name = element("span", { textContent: valueName(field, value), dir: "auto" });
    return element("label", {}, box, name, ...(count === null ? [] : [element("small", { textContent: count })]));
  });
  return element("fieldset", { dataset: { field } }, element("legend", { textContent: label(field) }), ...options);
}

export function drawFacets(hits, types, onChange) {
  const focused = document.activeElement.closest?.("#facets fieldset");
  const place = focused && [focused.dataset.field, [...focused.querySelectorAll("input")].indexOf(document.activeElement)];
  const shown = [...withRemembered(facetsOf(hits, types))].slice(0, MOST_FACETS);
  $("facets").replaceChildren(...shown.map(([field, counts]) => facet(field, counts, onChange)));
  $("filters").hidden = !Object.keys(types).length;
  if (place) document.querySelectorAll(`#facets [data-field="${CSS.escape(place[0])}"] input`)[place[1]]?.focus();
}

export function drawChips(onChange) {
  const chips = state.filters.map(({ field, value }) => [`${label(field)}: ${valueName(field, value)}`, () => toggleFilter(field, value)]);
  if (state.where) chips.push([state.where, () => (state.where = $("where").value = "")]);
  $("chips").replaceChildren(...chips.map(([text, remove]) => {
    const cross = element("span", { textContent: "✕", attributes: { "aria-hidden": "true" } });
    const button = element("button", { type: "button", attributes: { "aria-label": `Remove filter ${text}` } });
    button.append(element("span", { textContent: text, dir: "auto" }), cross);
    button.addEventListener("click", () => {
      remove();
      onChange();
      ($("chips").querySelector("button") || $("query")).focus();
    });
    return element("li", {}, button);
  }));
}
