// What the page shows lives in the address, so that every view can be shared and gone back to.

export const FIRST_K = 24;
export const MOST_K = 200;

const EMPTY = { q: "", type: "", k: FIRST_K, exact: false, legs: "", release: "", versus: "", where: "", view: "", sure: "" };

export const state = { ...EMPTY, filters: [] };

// A filter chosen from a facet is "attribute:value" in the address.
function filterOf(text) {
  const at = text.indexOf(":");
  return at > 0 ? [{ field: text.slice(0, at), value: text.slice(at + 1) }] : [];
}

export function readAddress() {
  const given = new URLSearchParams(location.search);
  const text = (name) => given.get(name) || "";
  Object.assign(state, {
    q: text("q"),
    type: text("type"),
    k: Math.min(MOST_K, Math.max(1, Number.parseInt(text("k"), 10) || FIRST_K)),
    exact: text("exact") === "1",
    legs: text("legs"),
    release: text("release"),
    versus: text("vs"),
    where: text("filter"),
    view: text("view"),
    sure: text("sure"),
    filters: given.getAll("f").flatMap(filterOf),
  });
}

export function address(firstType) {
  const wanted = new URLSearchParams();
  const set = (name, value) => value && wanted.set(name, value);
  set("q", state.q);
  set("type", state.type === firstType ? "" : state.type);
  set("k", state.k === FIRST_K ? "" : String(state.k));
  set("exact", state.exact ? "1" : "");
  set("legs", state.legs);
  set("release", state.release);
  set("vs", state.versus);
  set("filter", state.where);
  set("view", state.view);
  set("sure", state.sure);
  for (const { field, value } of state.filters) wanted.append("f", `${field}:${value}`);
  return wanted.size ? `?${wanted}` : location.pathname;
}

export function writeAddress(firstType, push) {
  const next = address(firstType);
  if (next === (location.search || location.pathname)) return;
  if (push) history.pushState(null, "", next);
  else history.replaceState(null, "", next);
}
