// Keys: / search, arrows move, Alt+digits tabs, Alt+E exact.

import { $ } from "./dom.js";

const cardsOf = (id) => [...$(id).querySelectorAll(".open")];

// Arrow keys walk the grid by what is seen, whatever number of columns fits; with two lists, left
// and right change the list.
function moveInHits(key) {
  const lists = [cardsOf("results"), cardsOf("others")];
  const list = lists.findIndex((cards) => cards.includes(document.activeElement));
  if (list < 0) return false;
  const cards = lists[list];
  const at = cards.indexOf(document.activeElement);
  const isSideways = key === "ArrowLeft" || key === "ArrowRight";
  if (isSideways && lists[1].length) {
    const other = lists[key === "ArrowLeft" ? 0 : 1];
    (other[at] || other.at(-1))?.focus();
    return true;
  }
  const top = (card) => card.closest(".card").offsetTop;
  const second = cards.findIndex((card) => top(card) > top(cards[0]));
  const perRow = second < 0 ? cards.length : second;
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
  tab.click();
  return true;
}

function pressed(event) {
  const { key, code, target } = event;
  const isTyping = target.matches("input:not([type=checkbox]), select");
  if (event.altKey && code === "KeyE") {
    $("exact").click();
  } else if (event.altKey && /^Digit[1-9]$/.test(code)) {
    $("tabs").children[Number(code.slice(5)) - 1]?.click();
  } else if (key === "/" && !isTyping) {
    $("query").focus();
    $("query").select();
  } else if (key === "ArrowDown" && target === $("query")) {
    document.querySelector(".open")?.focus();
  } else {
    return !isTyping && (moveInTabs(key) || (key.startsWith("Arrow") && moveInHits(key)));
  }
  return true;
}

export function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (!$("details").open && pressed(event)) event.preventDefault();
  });
}
