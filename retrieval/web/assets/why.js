// Why a hit is there: its scores, each leg's part in them, words that match, queries that voted.

import { LEGS, LEG_NAMES, element, label, marked, percent } from "./dom.js";

// What each leg added to a fused score, as shares of it.
export function legShares(hit, weights) {
  if (!hit.scores || !weights) return [];
  const parts = LEGS.map((leg) => [leg, Math.max(0, hit.scores[leg]) * weights[leg]]);
  const total = parts.reduce((sum, [, part]) => sum + part, 0);
  return total > 0 ? parts.map(([leg, part]) => [leg, part / total]) : [];
}

export function shareBar(hit, weights) {
  const shares = legShares(hit, weights);
  const bar = element("span", { className: "bar", attributes: { "aria-hidden": "true" } });
  const parts = shares.length ? shares : [["dense", Math.max(0, hit.score)]];
  for (const [leg, share] of parts) {
    if (share <= 0) continue;
    const part = element("i", { className: leg, title: `${LEG_NAMES[leg]} ${percent(share, 0)}` });
    part.style.flexBasis = percent(share);
    bar.append(part);
  }
  return bar;
}

export function scoreTexts(hit) {
  const cosine = ["cosine", hit.score.toFixed(3)];
  if (!hit.scores) return [cosine];
  const { fused, lexical, votes, probability } = hit.scores;
  const texts = [["fused", fused.toFixed(3)], cosine, ["words", lexical.toFixed(3)], ["votes", votes.toFixed(3)]];
  return probability === null ? texts : [["relevant", percent(probability, 0)], ...texts];
}

export function scoreLine(hit) {
  const texts = scoreTexts(hit).map(([name, value]) => element("span", { className: name }, `${name} `, element("b", { textContent: value })));
  return element("span", { className: "score" }, ...texts);
}

export function matchLines(hit, most) {
  if (!hit.why) return [];
  return hit.why.fields.slice(0, most).map(({ name, parts }) =>
    element("span", { className: "field" }, element("i", { textContent: label(name) }), " ", element("bdi", {}, ...marked(parts))),
  );
}

// Names the strongest of the known queries that voted for a hit.
export function voterLine(hit, most) {
  const voters = hit.why ? hit.why.voters.slice(0, most) : [];
  if (!voters.length) return [];
  const names = voters.flatMap((voter) => [" ", element("q", { textContent: voter.query, dir: "auto" })]);
  return [element("span", { className: "voters" }, "like", ...names)];
}
