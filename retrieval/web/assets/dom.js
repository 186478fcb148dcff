// Small helpers: elements, numbers as texts, names of legs.

export const $ = (id) => document.getElementById(id);

export const LEGS = ["dense", "lexical", "votes"];
export const LEG_NAMES = { dense: "Vectors", lexical: "Words", votes: "Votes" };

// Makes an element. Texts go in as text, never as HTML.
export function element(tag, properties = {}, ...children) {
  const { dataset = {}, attributes = {}, ...plain } = properties;
  const node = Object.assign(document.createElement(tag), plain);
  Object.assign(node.dataset, dataset);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const ms = (ns) => (ns / 1e6 < 10 ? (ns / 1e6).toFixed(2) : (ns / 1e6).toFixed(0)) + " ms";
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
export const label = (name) => name.replaceAll("_", " ");

// Parts of a text that match the query: 1 a word of it, 2 most of a word's letters.
export function marked(parts) {
  return parts.map(([text, kind]) => {
    if (!kind) return text;
    return element("mark", { textContent: text, className: kind === 2 ? "letters" : "" });
  });
}
