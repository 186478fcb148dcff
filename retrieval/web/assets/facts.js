// How an answer was found, at a glance: recall, cache, where the time went.

import { $, LEG_NAMES, element, ms, percent } from "./dom.js";

const MUCH_UNKNOWN = 0.3;

const fact = (text, kind = "") => element("li", { textContent: text, className: kind });

function recallFacts(page, entity) {
  const facts = [];
  if (page.graph) {
    const { found, of } = page.graph;
    facts.push(fact(`graph finds ${found} of these ${of}`, found < of ? "warn" : "good"));
    facts.push(fact(`exact ${ms(page.timings.search_ns)}, graph ${ms(page.graph.timings.search_ns)}`));
  } else {
    if (page.plan === "gated") facts.push(fact("taken for nonsense by the query gate", "warn"));
    else if (page.plan !== "fused") facts.push(fact(page.ef ? `${page.plan}, ef ${page.ef}` : page.plan));
    if (page.estimated_recall !== null) {
      const kept = !entity || entity.target_recall === undefined || page.estimated_recall >= entity.target_recall - 1e-6;
      facts.push(fact(`expected recall ${percent(page.estimated_recall)}`, kept ? "good" : "warn"));
    }
  }
  if (entity && entity.ann_recall_at_10 !== null) facts.push(fact(`measured ANN recall@10 ${percent(entity.ann_recall_at_10)} (${entity.index_kind})`));
  return facts;
}

export function factsOf(page, entity) {
  const cache = [["encoded now"], ["cache hit: query vector", "good"], ["cache hit: whole answer", "good"]][page.answer_cached ? 2 : Number(page.cache_hit)];
  const facts = [fact(...cache)];
  if (page.legs.length) facts.push(fact(page.legs.map((leg) => LEG_NAMES[leg].toLowerCase()).join(" + ")));
  facts.push(...recallFacts(page, entity));
  if (page.selectivity !== null) facts.push(fact(`${percent(page.selectivity)} pass the filter`));
  if (page.unknown_share >= MUCH_UNKNOWN) facts.push(fact(`${percent(page.unknown_share, 0)} of the query is unknown to the tower`, "warn"));
  return facts;
}

// A bar of the stages, with their times beside it.
export function drawStages(timings) {
  const { queue_ns, encode_ns, search_ns, rerank_ns, total_ns } = timings;
  const rest = Math.max(0, total_ns - queue_ns - encode_ns - search_ns - rerank_ns);
  const stages = [["queue", queue_ns], ["encode", encode_ns], ["search", search_ns], ["rerank", rerank_ns], ["rest", rest]];
  const spent = stages.filter(([, ns]) => ns > 0);
  const bar = element("span", { className: "bar", attributes: { "aria-hidden": "true" } });
  bar.append(...spent.map(([name, ns]) => {
    const part = element("i", { className: name });
    part.style.flexGrow = ns;
    return part;
  }));
  const legend = spent.map(([name, ns]) => element("span", { className: name, textContent: `${name} ${ms(ns)}` }));
  $("stages").replaceChildren(bar, ...legend);
  $("stages").hidden = false;
}

export function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}
