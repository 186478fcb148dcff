// Hits as cards with pictures, or as a compact list where there are none.

import { element, label, marked } from "./dom.js";
import { matchLines, scoreLine, shareBar, voterLine } from "./why.js";

const MANY_ITEMS = 3;
const LONG = 90;

export function picture(hit) {
  if (!hit.picture) return hit.character;
  const isOwn = hit.picture.startsWith("api/");
  const image = element("img", { src: hit.picture, alt: "", loading: "lazy", className: isOwn ? "" : "photo" });
  image.addEventListener("error", () => image.replaceWith(hit.character || "◌"), { once: true });
  return image;
}

export const hasPicture = (hit) => Boolean(hit.picture || hit.character);

// What is known of a hit beside its title, in few words.
function summary(hit, shown) {
  const texts = Object.entries(hit.attributes)
    .filter(([name]) => !["title", "query", "image", "character", "engaged_queries", ...shown].includes(name))
    .map(([name, value]) => [name, Array.isArray(value) ? value.slice(0, MANY_ITEMS).join(", ") : String(value)])
    .filter(([, text]) => text.length && text.length <= LONG && !/^(https?|data):/.test(text))
    .slice(0, 4);
  return texts.map(([name, text]) => element("span", { className: "fact" }, element("i", { textContent: label(name) }), " ", element("bdi", { textContent: text })));
}

function notes(hit, rank, ranks) {
  if (hit.missed_by_graph) return [element("span", { className: "missed", textContent: "missed by the graph" })];
  if (!ranks) return [];
  const other = ranks.get(hit.id);
  if (other === undefined) return [element("span", { className: "missed", textContent: "only here" })];
  const text = other === rank ? "both, same place" : `both, there ${other}.`;
  return [element("span", { className: "shared", textContent: text })];
}

// One hit; `ranks` are the places of ids in the other column, if there are two. Its title is the
// button, whose area is the whole card (page.css); the rest describes it.
export function hitItem(hit, rank, { column, weights, isList, ranks, onOpen }) {
  const id = `${column}-${rank}`;
  const title = hit.why ? marked(hit.why.title) : [hit.title];
  const open = element("button", { type: "button", className: "open title", dir: "auto", attributes: { "aria-describedby": id } }, ...title);
  open.addEventListener("click", () => onOpen(hit, weights));
  const fields = matchLines(hit, isList ? 3 : 1);
  const shown = hit.why ? hit.why.fields.map((field) => field.name) : [];
  const about = element("div", { className: "about", id },
    ...fields,
    ...(isList ? [element("span", { className: "summary" }, ...summary(hit, shown))] : []),
    ...voterLine(hit, isList ? 3 : 1),
    ...notes(hit, rank, ranks),
    element("span", { className: "scores" }, shareBar(hit, weights), scoreLine(hit)),
  );
  const card = element("li", { className: "card" });
  if (ranks) card.classList.toggle("both", ranks.has(hit.id));
  if (isList) card.append(element("span", { className: "rank", textContent: rank }));
  if (!isList || hasPicture(hit)) card.append(element("span", { className: "picture" }, picture(hit)));
  card.append(element("div", { className: "text" }, open, about));
  return card;
}
