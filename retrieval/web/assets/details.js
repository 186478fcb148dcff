// The dialog about one hit: scores by leg, queries that voted, attributes.

import { $, LEGS, LEG_NAMES, element, label, percent } from "./dom.js";
import { hasPicture, picture } from "./hits.js";
import { legShares, matchLines, scoreLine } from "./why.js";

function legTable(hit, weights) {
  const shares = new Map(legShares(hit, weights));
  if (!shares.size) return [];
  const rows = LEGS.map((leg) =>
    element("tr", {},
      element("th", { textContent: LEG_NAMES[leg], scope: "row" }),
      element("td", { textContent: hit.scores[leg].toFixed(4) }),
      element("td", { textContent: String(Number(weights[leg].toPrecision(4))) }),
      element("td", { textContent: percent(shares.get(leg), 0) }),
    ),
  );
  const heads = ["Leg", "Score", "Weight", "Share"].map((text) => element("th", { textContent: text, scope: "col" }));
  return [element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))];
}

function voterList(hit, ask) {
  const voters = hit.why ? hit.why.voters : [];
  if (!voters.length) return [];
  const items = voters.map((voter) => {
    const button = element("button", { type: "button", className: "plain", textContent: voter.query, dir: "auto" });
    button.addEventListener("click", () => ask(voter.query));
    return element("li", {}, button, ` ${percent(voter.share, 0)} of its votes, cosine ${voter.cosine.toFixed(3)}`);
  });
  return [element("h3", { textContent: "Known queries like this one that led to it" }), element("ul", {}, ...items)];
}

export function openDetails(hit, weights, ask) {
  const askAndClose = (text) => {
    $("details").close();
    ask(text);
  };
  $("details-picture").replaceChildren(...(hasPicture(hit) ? [picture(hit)] : []));
  $("details-title").textContent = hit.title;
  $("details-id").textContent = hit.id;
  $("details-why").replaceChildren(scoreLine(hit), ...matchLines(hit, 3), ...legTable(hit, weights), ...voterList(hit, askAndClose));
  const rows = Object.entries(hit.attributes).filter(([name]) => name !== "title");
  $("details-attributes").replaceChildren(...rows.flatMap(([name, value]) => [
    element("dt", { textContent: label(name) }),
    element("dd", { textContent: Array.isArray(value) ? value.join(", ") : String(value), dir: "auto" }),
  ]));
  $("more").onclick = () => askAndClose(hit.title);
  $("details").showModal();
}
