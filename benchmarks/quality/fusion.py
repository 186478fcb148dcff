"""``omni bench fusion``: vectors, words and neighbouring queries, alone and fused.

A part of the train queries is held back from every leg: the weights are fitted on it. Held-out
pairs are looked at once, for the record. A tower that was trained or pretrained on the held-back
queries makes the fit too fond of its own leg: multilingual USE has seen none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import polars as pl

from benchmarks.quality.fusion_slices import cold_entities, misspelt, without_known_queries
from benchmarks.record import Measurement, out_option, write_record
from encoders.commands.console import (
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.datasets.dataset import Dataset, load_sample, with_engaged_queries
from encoders.datasets.halves import DEV
from encoders.evaluation.baselines import cached, default_cache, unit_rows, use_encoder
from encoders.evaluation.metrics import QuerySums, paired_difference
from encoders.text.entity_texts import entity_texts
from encoders.text.hashing import text_bucket
from index_builder.ann import AnnConfig
from index_builder.fusion.fused_search import DEPTH, FusedIndex, FusedQuery
from index_builder.fusion.nonsense import Vocabulary, nonsense_queries
from index_builder.fusion.votes import Votes
from index_builder.fusion.weights import LEGS, CalibrationCase, Fusion, fit_fusion
from index_builder.lexical.counting import text_fields
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.search.entity_index import EntityIndex, IndexConfig

TYPES = ("pin", "product", "ad")
POOLED = {"ad": "product"}
"""Types with few pairs, and the one whose queries help to choose their weights."""
HELD_BACK_OF = 33
"""One train query in this many is held back."""
SALT = 19
NONSENSE = 500
NONSENSE_SEED = 7
OTHER_WORDS = Vocabulary(
    subjects=(
        "the appellate panel",
        "our quarterly depreciation plan",
        "the second claimant",
        "a covariant derivative",
        "the zoning ordinance",
        "each eigenvalue of the Hessian",
        "the reinsurance treaty",
        "an antiderivative of the integrand",
        "her doctoral supervisor",
    ),
    verbs=(
        "was remanded pursuant to",
        "is to be construed in accordance with",
        "converges almost surely under",
        "must be reconciled against",
        "does not preclude recovery under",
        "is bounded uniformly by",
        "was ratified notwithstanding",
    ),
    objects=(
        "section 14(b) of the enabling statute because no objection was preserved.",
        "the ergodic theorem for Markov kernels",
        "generally accepted accounting principles",
        "a Lipschitz constant independent of n",
        "the schedule of deferred tax liabilities subject to approval.",
        "the minutes of the previous meeting",
        "double-blind randomised protocols",
    ),
    names=("buf", "ctx", "self._cache", "idx", "ptr", "ret", "cfg", "params", "tmp", "argv"),
    calls=("memcpy", "malloc", "np.reshape", "json.loads", "std::move", "printf", "parseInt"),
    code=(
        "for (int {a} = 0; {a} < {n}; ++{a}) {{ {f}({b}, {a}); }}",
        "SELECT {a}, COUNT(*) FROM {b} WHERE {a} IS NOT NULL GROUP BY {n};",
        "const {a} = await {f}({b}[{n}]) ?? {a};",
        "#define {a}(x) ((x) << {n}) /* {b} */",
        "return {f}(*{a}, **{b}) + 0x{n:x}",
        "grep -rn '{a}' --include=*.h | awk '{{print ${n}}}' > {b}.log",
    ),
)
"""Gates are fitted on queries of another seed and other words."""
SLICES = ("typo", "cold")
SLICE_QUERIES = 2_000
"""Of one entity type that a slice looks at."""
_SYSTEMS = (*LEGS, "fused")


@dataclass(frozen=True)
class Tower:
    """What makes the vectors."""

    name: str
    queries: Callable[[Sequence[str]], np.ndarray]
    """Texts -> float32 ``(N, D)``, unit rows."""
    entities: Callable[[pl.DataFrame], np.ndarray]
    """Catalogue rows with engaged queries -> float32 ``(N, D)``, unit rows."""


def make_tower(bundle: Path | None) -> Tower:
    """Load a bundle; without one, multilingual USE on both sides, zero-shot."""
    if bundle is not None:
        from encoders.towers.bundle import load_bundle

        model = load_bundle(bundle)
        return Tower(
            bundle.name, lambda texts: model.embed_queries(list(texts)), model.embed_entities
        )
    encode = cached(use_encoder(1), "use", default_cache())
    return Tower(
        "multilingual USE, zero-shot",
        lambda texts: unit_rows(encode(texts)),
        lambda rows: unit_rows(encode(entity_texts(rows))),
    )


def held_back(dataset: Dataset) -> Dataset:
    """Return the data set with a part of its train queries in a split ``validation``."""
    bucket = pl.Series(text_bucket(dataset.pairs["query"], SALT, HELD_BACK_OF))
    chosen = (pl.col("split") == "train") & (bucket == 0)
    split = pl.when(chosen).then(pl.lit("validation")).otherwise("split").alias("split")
    return Dataset(
        dataset.catalogue,
        dataset.pairs.with_columns(split),
        name=dataset.name,
        label=dataset.label,
    )


class Asked(NamedTuple):
    """Queries of one entity type and split with the rows annotated for each."""

    queries: list[str]
    languages: list[str]
    relevant: list[set[int]]

    def only(self, rows: set[int]) -> Asked:
        """Keep annotations of some rows, and the queries that have any."""
        kept = [
            (query, language, own & rows)
            for query, language, own in zip(*self, strict=True)
            if own & rows
        ]
        return Asked(
            [q for q, _, _ in kept], [lang for _, lang, _ in kept], [r for _, _, r in kept]
        )


def asked(dataset: Dataset, entity_type: str, split: str, index: EntityIndex) -> Asked:
    """Gather the queries of a split."""
    pairs = (
        dataset.split(split)
        .filter(pl.col("entity_type") == entity_type)
        .group_by("query", maintain_order=True)
        .agg(pl.col("language").first(), pl.col("entity_id").unique(maintain_order=True))
    )
    rows = [set(index.ids.rows_of(ids).tolist()) for ids in pairs["entity_id"].to_list()]
    return Asked(pairs["query"].to_list(), pairs["language"].to_list(), rows)


def build_known(dataset: Dataset, tower: Tower) -> EntityIndex:
    """Index the known queries."""
    config = IndexConfig(kind="auto", ann=AnnConfig(threads=2))
    known = dataset.split("train")
    names = known["query"].unique(maintain_order=True).to_list()
    with stage(f"embed {len(names):,} known queries"):
        vectors = tower.queries(names)
    with stage("index the known queries"):
        calibration = vectors[:: max(1, len(names) // 500)]
        return EntityIndex.build(
            "query", names, vectors, None, config, calibration_queries=calibration
        )


def build_legs(
    dataset: Dataset, tower: Tower, words_queries: int, queries: EntityIndex
) -> dict[str, FusedIndex]:
    """Index every entity type, with the votes of known queries."""
    config = IndexConfig(kind="auto", ann=AnnConfig(threads=2))
    known = dataset.split("train")
    legs = {}
    for entity_type in TYPES:
        with stage(f"{entity_type}: vectors, words and votes"):
            rows = dataset.of_type(entity_type)
            texts = with_engaged_queries(rows, dataset.pairs, words_queries)
            dense = with_engaged_queries(rows, dataset.pairs, 20)
            lexical = LexicalIndex.build(text_fields(texts), rows.height)
            ids = rows["id"].to_list()
            index = EntityIndex.build(
                entity_type, ids, tower.entities(dense), None, config, lexical=lexical
            )
            pairs = known.filter(pl.col("entity_type") == entity_type)
            votes = Votes.build(pairs.select("query", "entity_id"), queries.ids, index.ids)
        legs[entity_type] = FusedIndex(index, queries, votes)
    return legs


class Cases(NamedTuple):
    """Scored candidates of every query."""

    cases: list[CalibrationCase]
    positives: np.ndarray
    """float64 ``(Q,)``."""


def score(legs: FusedIndex, queries: Sequence[FusedQuery], relevant: Sequence[set[int]]) -> Cases:
    """Score the candidates of queries by every leg."""
    cases = []
    for query, rows in zip(queries, relevant, strict=True):
        found = legs.candidates(query, DEPTH, {})
        is_relevant = np.fromiter((row in rows for row in found.rows.tolist()), np.bool_)
        case = CalibrationCase(found.scores, is_relevant, len(rows), query.nearest, found.is_cold)
        cases.append(case)
    return Cases(cases, np.array([len(rows) for rows in relevant], np.float64))


def hits(cases: Cases, weights: Sequence[float]) -> np.ndarray:
    """Count the annotated entities among the ten best of each query, float64 ``(Q,)``.

    Candidates that score nothing by these weights are not answers.
    """
    found = []
    for case in cases.cases:
        fused = case.scores @ np.array(weights, np.float32)
        best = np.argsort(-fused, kind="stable")[:10]
        found.append(float(np.count_nonzero(case.relevant[best] & (fused[best] > 0))))
    return np.array(found)


def score_texts(
    legs: FusedIndex, tower: Tower, texts: Sequence[str], relevant: Sequence[set[int]]
) -> Cases:
    """Embed queries, and score their candidates by every leg."""
    vectors = tower.queries(texts)
    queries = [legs.query(*each) for each in zip(texts, vectors, strict=True)]
    return score(legs, queries, relevant)


def gate_losses(fusion: Fusion, cases: Cases, nonsense: Cases) -> dict[str, float] | None:
    """Measure the query gate: nonsense emptied, and hits of the fused answers lost."""
    if fusion.gate is None:
        return None
    found = hits(cases, fusion.weights)
    lost = fusion.gate.empties(np.array([case.gate_signals for case in cases.cases]))
    emptied = fusion.gate.empties(np.array([case.gate_signals for case in nonsense.cases]))
    return {
        "nonsense_emptied": round(float(emptied.mean()), 4),
        "hits_lost": round(float(found[lost].sum() / max(1.0, found.sum())), 4),
        "queries_emptied": round(float(lost.mean()), 4),
    }


def compare(cases: Cases, fusion: Fusion, languages: Sequence[str]) -> dict[str, Any]:
    """Measure each leg and the fused answer on the dev half of the held-out pairs."""
    weights = dict(zip(LEGS, np.eye(len(LEGS)).tolist(), strict=True)) | {"fused": fusion.weights}
    counted = {name: hits(cases, weights[name]) for name in _SYSTEMS}
    total = cases.positives.sum()
    difference = paired_difference(
        QuerySums(counted["fused"], cases.positives), QuerySums(counted["dense"], cases.positives)
    ).difference
    by_language = {}
    for language in sorted(set(languages)):
        chosen = np.array([name == language for name in languages])
        pairs = cases.positives[chosen].sum()
        by_language[language] = {
            "pairs": int(pairs),
            **{name: round(float(counted[name][chosen].sum() / pairs), 4) for name in _SYSTEMS},
        }
    return {
        "queries": len(cases.cases),
        "pairs": int(total),
        "recall_at_10": {n: round(float(counted[n].sum() / total), 4) for n in _SYSTEMS},
        "fused_less_dense": [round(float(x), 4) for x in difference],
        "by_language": by_language,
    }


def recalls(cases: Cases, fusion: Fusion) -> dict[str, float]:
    """Return labelled Recall@10 of the dense leg alone and fused."""
    total = max(1.0, float(cases.positives.sum()))
    dense, fused = hits(cases, (1.0, 0.0, 0.0)).sum(), hits(cases, fusion.weights).sum()
    return {"dense": round(float(dense) / total, 4), "fused": round(float(fused) / total, 4)}


def measure_typos(legs: FusedIndex, tower: Tower, fusion: Fusion, test: Asked) -> dict[str, Any]:
    """Measure what one edit of a query costs, by vectors alone and fused."""
    edited = misspelt(test.queries)
    chosen = [row for row, text in enumerate(edited) if text is not None][:SLICE_QUERIES]
    relevant = [test.relevant[row] for row in chosen]
    clean = [test.queries[row] for row in chosen]
    typos = [text for row in chosen if (text := edited[row]) is not None]
    found = {
        "clean": recalls(score_texts(legs, tower, clean, relevant), fusion),
        "typo": recalls(score_texts(legs, tower, typos, relevant), fusion),
    }
    loss = {
        name: round(found["clean"][name] - found["typo"][name], 4) for name in ("dense", "fused")
    }
    return {"queries": len(chosen), **found, "loss": loss}


def measure_cold(legs: FusedIndex, tower: Tower, fusion: Fusion, test: Asked) -> dict[str, Any]:
    """Measure queries by the entities that no known query led to; ``test`` holds only those."""
    cases = score_texts(legs, tower, test.queries[:SLICE_QUERIES], test.relevant[:SLICE_QUERIES])
    found = compare(cases, fusion, test.languages[:SLICE_QUERIES])
    del found["by_language"]
    return found


def measure_slices(
    measured: Measured, tower: Tower, dataset: Dataset, words_queries: int, slices: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Measure the slices that were asked for, by entity type."""
    found: dict[str, dict[str, Any]] = {name: {} for name in slices}
    for entity_type, legs in measured.legs.items():
        fusion = measured.fusions[entity_type]
        legs = replace(legs, fusion=fusion)
        if "typo" in slices:
            with stage(f"{entity_type}: misspelt queries"):
                test = asked(dataset, entity_type, DEV, legs.entities)
                found["typo"][entity_type] = measure_typos(legs, tower, fusion, test)
    if "cold" in slices:
        cold = cold_entities(dataset)
        colder = without_known_queries(dataset, cold)
        for entity_type, legs in build_legs(colder, tower, words_queries, measured.queries).items():
            rows = set(legs.entities.ids.rows_of(sorted(cold)).tolist())
            with stage(f"{entity_type}: entities without known queries"):
                test = asked(colder, entity_type, DEV, legs.entities).only(rows)
                fusion = measured.fusions[entity_type]
                fused = replace(legs, fusion=fusion)
                found["cold"][entity_type] = measure_cold(fused, tower, fusion, test)
    return found


def time_answers(
    legs: FusedIndex, texts: Sequence[str], vectors: np.ndarray, fusion: Fusion
) -> dict[str, list[float]]:
    """Measure CPU microseconds a query, p50 and p99: dense alone, neighbours, and the whole."""
    times: dict[str, list[int]] = {"dense top 10": [], "known queries": [], "fused top 10": []}
    for text, vector in zip(texts, vectors, strict=True):
        start = time.process_time_ns()
        legs.entities.search(vector, 10)
        dense = time.process_time_ns()
        query = legs.query(text, vector)
        known = time.process_time_ns()
        legs.search(query, 10, weights=fusion.weights)
        end = time.process_time_ns()
        times["dense top 10"].append(dense - start)
        times["known queries"].append(known - dense)
        times["fused top 10"].append(end - dense)
    return {
        name: [round(float(np.quantile(t, q)) / 1e3, 1) for q in (0.5, 0.99)]
        for name, t in times.items()
    }


class Measured(NamedTuple):
    """What the whole of the dev half was measured with, and the figures."""

    queries: EntityIndex
    legs: dict[str, FusedIndex]
    fusions: dict[str, Fusion]
    figures: dict[str, Any]


def measure(dataset: Dataset, tower: Tower, words_queries: int) -> Measured:
    """Fit on held-back queries, then measure on the dev half of the held-out pairs."""
    known = build_known(dataset, tower)
    legs = build_legs(dataset, tower, words_queries, known)
    calibration = {}
    for entity_type, index in legs.items():
        with stage(f"{entity_type}: candidates of the held-back queries"):
            held = asked(dataset, entity_type, "validation", index.entities)
            calibration[entity_type] = score_texts(index, tower, held.queries, held.relevant)
    fitting, judging = (
        nonsense_queries(NONSENSE),
        nonsense_queries(NONSENSE, NONSENSE_SEED, OTHER_WORDS),
    )
    nothing: list[set[int]] = [set()] * NONSENSE
    found: dict[str, Any] = {}
    fusions: dict[str, Fusion] = {}
    for entity_type, index in legs.items():
        pooled = calibration[POOLED[entity_type]].cases if entity_type in POOLED else []
        with stage(f"{entity_type}: fit, then the dev half of the held-out queries"):
            nonsense = score_texts(index, tower, fitting, nothing).cases
            own = calibration[entity_type].cases
            fusion = fit_fusion(own, "held-back train queries", pooled, nonsense)
            fusions[entity_type] = fusion
            index = replace(index, fusion=fusion)
            test = asked(dataset, entity_type, DEV, index.entities)
            cases = score_texts(index, tower, test.queries, test.relevant)
            vectors = tower.queries(test.queries[:2000])
            others = score_texts(index, tower, judging, nothing)
        lexical, votes = index.entities.lexical, index.votes
        assert lexical is not None and votes is not None
        size = sum(getattr(lexical.postings, name).nbytes for name in lexical.postings.lengths())
        found[entity_type] = {
            **compare(cases, fusion, test.languages),
            "weights": dict(zip(LEGS, fusion.weights, strict=True)),
            "on": fusion.enabled,
            "fitted": [fusion.queries, fusion.gain, fusion.gain_low, fusion.gain_high],
            "gate": gate_losses(fusion, cases, others),
            "cpu_us_p50_p99": time_answers(index, test.queries[:2000], vectors, fusion),
            "bytes_per_entity": {
                "words": round(size / max(1, lexical.postings.count)),
                "votes": round((votes.offsets.nbytes + votes.rows.nbytes) / max(1, votes.count)),
            },
        }
    return Measured(known, legs, fusions, found)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--words-queries",
    default=50,
    show_default=True,
    type=click.IntRange(0),
    help="Train queries of an entity among its words.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    type=click.Choice(SLICES),
    help="Also measure queries with one typo, or entities without known queries. Repeatable.",
)
@click.option("--name", default="fusion", show_default=True, help="Slug of the record.")
@out_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    words_queries: int,
    slices: tuple[str, ...],
    name: str,
    out: Path,
    as_json: bool,
) -> None:
    """Labelled Recall@10 of the dense, lexical and vote legs and of all fused, on the sample.

    The towers are BUNDLE's, else multilingual USE on both sides. The pairs are human annotations
    standing in for engagement, not clicks. Weights are fitted on train queries that no leg has
    seen; the dev half of the held-out pairs is measured once.

    Example: omni bench fusion
    """
    tower = make_tower(bundle)
    dataset = held_back(load_sample(engaged_queries=0, images=False))
    measured = measure(dataset, tower, words_queries)
    found = measured.figures
    by_slice = measure_slices(measured, tower, dataset, words_queries, slices)
    path = write_record(
        name,
        Measurement(
            dataset={"name": dataset.name, "real": True, "note": dataset.label},
            config={
                "tower": tower.name,
                "words_queries": words_queries,
                "depth": DEPTH,
                "held_back": f"1 train query in {HELD_BACK_OF}",
                "pooled": POOLED,
            },
            protocol={
                "metric": "labelled Recall@10 of held-out (dev) pairs within the entity type",
                "interval": "paired bootstrap over queries, 95%",
                "clock": "process CPU time, one query at a time",
            },
            metrics={**found, **({"slices": by_slice} if by_slice else {})},
            libraries=("numpy", "polars"),
        ),
        folder=out,
    )
    if as_json:
        print_json({**found, "slices": by_slice})
        return
    _print(found)
    _print_slices(by_slice)
    say(f"record: {path.name}")


def _print(found: dict[str, Any]) -> None:
    rows = []
    for entity_type, figures in found.items():
        gain, low, high = figures["fused_less_dense"]
        recall = figures["recall_at_10"]
        rows.append(
            [
                entity_type,
                figures["pairs"],
                *(recall[system] for system in _SYSTEMS),
                f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]",
                "on" if figures["on"] else "off",
                " / ".join(f"{weight:g}" for weight in figures["weights"].values()),
                figures["cpu_us_p50_p99"]["dense top 10"][0],
                figures["cpu_us_p50_p99"]["fused top 10"][0],
            ]
        )
    print_table(
        "Labelled Recall@10 on held-out (dev) pairs (annotations, not clicks)",
        [
            "entity type",
            "pairs",
            *_SYSTEMS,
            "fused less dense",
            "default",
            "weights",
            "dense us p50",
            "fused us p50",
        ],
        rows,
    )
    gates = [
        [entity_type, figures["gate"]["nonsense_emptied"], figures["gate"]["hits_lost"]]
        for entity_type, figures in found.items()
        if figures["gate"] is not None
    ]
    print_table(
        f"Query gate: {NONSENSE} nonsense queries of another draw, and held-out (dev) pairs",
        ["entity type", "nonsense emptied", "hits lost"],
        gates,
    )


def _print_slices(found: dict[str, dict[str, Any]]) -> None:
    typo = found.get("typo", {})
    if typo:
        print_table(
            "Labelled Recall@10 of queries with one typo, and what the typo costs",
            ["entity type", "queries", "dense", "fused", "dense loses", "fused loses"],
            [
                [
                    entity_type,
                    figures["queries"],
                    figures["typo"]["dense"],
                    figures["typo"]["fused"],
                    figures["loss"]["dense"],
                    figures["loss"]["fused"],
                ]
                for entity_type, figures in typo.items()
            ],
        )
    cold = found.get("cold", {})
    if cold:
        print_table(
            "Labelled Recall@10 of entities that no known query led to",
            ["entity type", "pairs", *_SYSTEMS, "fused less dense"],
            [
                [
                    entity_type,
                    figures["pairs"],
                    *(figures["recall_at_10"][system] for system in _SYSTEMS),
                    "{:+.3f} [{:+.3f}, {:+.3f}]".format(*figures["fused_less_dense"]),
                ]
                for entity_type, figures in cold.items()
            ],
        )
