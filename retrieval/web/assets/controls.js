// What to search: entity type, legs, release, and what to compare with.

import { $, LEGS, LEG_NAMES, element } from "./dom.js";
import { state } from "./state.js";

const NAMES = { pin: "Pins", product: "Products", query: "Queries", ad: "Ads" };
const ORDER = ["pin", "product", "query", "ad"];

const place = (type) => (ORDER.indexOf(type) + ORDER.length + 1) % (ORDER.length + 1);

export const typesOf = (release) => release.entities.map((entity) => entity.entity_type).sort((a, b) => place(a) - place(b));
export const entityOf = (release, type) => release && release.entities.find((entity) => entity.entity_type === type);

export function drawTabs(release, onChoose) {
  const types = typesOf(release);
  if (!types.includes(state.type)) state.type = types[0] || "";
  $("tabs").replaceChildren(...types.map((type) => {
    const count = element("small", { textContent: Number(entityOf(release, type).count).toLocaleString("en") });
    const tab = element("button", { type: "button", id: `tab-${type}`, dataset: { type }, attributes: { role: "tab", "aria-controls": "panel" } });
    tab.append(NAMES[type] || type, count);
    tab.addEventListener("click", () => onChoose(type));
    return tab;
  }));
  markTab();
}

export function markTab() {
  for (const tab of $("tabs").children) {
    const isSelected = tab.dataset.type === state.type;
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
    if (isSelected) $("panel").setAttribute("aria-labelledby", tab.id);
  }
}

// Legs that answer if nobody says: those of the release where it proved that fused is better.
const defaultLegs = (entity) => (entity.fused ? entity.legs : ["dense"]);

export function drawLegs(entity, onChange) {
  const available = (entity && entity.legs) || ["dense"];
  $("legs").hidden = available.length < 2;
  if ($("legs").hidden) return;
  const usual = String(defaultLegs(entity));
  const changed = () => {
    const chosen = LEGS.filter((leg) => $("leg-boxes").querySelector(`[value=${leg}]:checked`));
    const wanted = String(chosen.length ? chosen : ["dense"]);
    state.legs = wanted === usual ? "" : wanted;
    onChange();
  };
  const boxes = available.map((leg) => element("input", { type: "checkbox", value: leg, onchange: changed }));
  const labels = boxes.map((box) => element("label", { className: box.value }, box, element("span", { textContent: LEG_NAMES[box.value] })));
  if ($("leg-boxes").dataset.of !== `${state.type} ${usual} ${available}`) {
    $("leg-boxes").dataset.of = `${state.type} ${usual} ${available}`;
    $("leg-boxes").replaceChildren(...labels);
  }
  const on = (state.legs || usual).split(",");
  for (const box of $("leg-boxes").querySelectorAll("input")) box.checked = on.includes(box.value);
}

// Whether an answer by these legs says how likely each hit is relevant; "": the release's legs.
export const hasProbability = (entity, legs) =>
  Boolean(entity && entity.calibrated) && String(legs || defaultLegs(entity)) === String(LEGS);

const SURE = [["", "all"], ["0.25", "at least 25%"], ["0.5", "at least 50%"], ["0.75", "at least 75%"], ["0.9", "at least 90%"]];

export function drawSure(entity) {
  $("sure-choice").hidden = !hasProbability(entity, state.legs);
  if (!(Number(state.sure) > 0 && Number(state.sure) <= 1)) state.sure = "";
  const own = state.sure && !SURE.some(([value]) => value === state.sure) ? [[state.sure, `at least ${100 * Number(state.sure)}%`]] : [];
  $("sure").replaceChildren(...[...SURE, ...own].map(([value, name]) => element("option", { value, textContent: name, selected: value === state.sure })));
}

export function drawReleases(release) {
  const ids = release.loaded_release_ids;
  $("release-choice").hidden = ids.length < 2;
  $("release").replaceChildren(...ids.map((id) => element("option", { value: id, textContent: id, selected: id === release.release_id })));
}

// What the second column may show, as [value of `vs`, name, what differs in its search].
export function comparisons(release, entity) {
  const legs = (entity && entity.legs) || ["dense"];
  const found = [["exact", "Exact search", { exact: true }]];
  if (legs.length > 1) {
    for (const leg of legs) found.push([`legs:${leg}`, `${LEG_NAMES[leg]} alone`, { legs: leg }]);
    found.push([`legs:${legs}`, "All legs fused", { legs: String(legs) }]);
  }
  for (const id of release.loaded_release_ids) if (id !== release.release_id) found.push([`release:${id}`, `Release ${id}`, { release: id }]);
  return found;
}

export function drawComparisons(release, entity) {
  const choices = [["", "Nothing"], ...comparisons(release, entity)];
  if (!choices.some(([value]) => value === state.versus)) state.versus = "";
  $("versus").replaceChildren(...choices.map(([value, name]) => element("option", { value, textContent: name, selected: value === state.versus })));
}
