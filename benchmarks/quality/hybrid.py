"""``omni bench hybrid``: fused answers beside the hybrid search of what a user would pick instead.

All index the same texts and vectors. Our weights are fitted on held-back train queries; of a peer,
tokeniser and ranker are chosen on dev queries, which is more than our side gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.quality.fusion import (
    HELD_BACK_OF,
    POOLED,
    Asked,
    Cases,
    Tower,
    asked,
    build_known,
    build_legs,
    held_back,
    hits,
    make_tower,
    score_texts,
)
from benchmarks.quality.hybrid_peers import (
    DEPTH,
    EF,
    PEERS,
    RANKERS,
    Corpus,
    Hybrid,
    K,
    Peer,
    Ranker,
)
from benchmarks.record import Measurement, out_option, require_clean_tree, write_record
from encoders.commands.console import (
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.datasets.dataset import Dataset, load_sample, with_engaged_queries
from encoders.datasets.halves import DEV, TEST, describe_split
from encoders.evaluation.metrics import QuerySums, bootstrap_interval, paired_difference
from encoders.text.entity_texts import entity_texts
from index_builder.fusion.fused_search import FusedIndex
from index_builder.fusion.weights import fit_fusion

OURS = "ours: vectors, words, votes"
WITHOUT_VOTES = "ours: vectors and words"
SHARES = np.linspace(0, 1, 21)
"""Shares of the words among two legs that are tried."""
TIMED = 50
"""Queries that are timed, after as many that are not."""

Answer = Callable[[str, np.ndarray], Sequence[int]]
"""Text and vector of a query -> rows of the ten best."""


class Choice(NamedTuple):
    """A peer's best setting."""

    built: Hybrid
    tokeniser: str
    ranker: Ranker
    recalls: dict[str, float]
    """Labelled Recall@10 on dev queries, by ``tokeniser, ranker``."""


def sample_queries(all_asked: Asked, most: int, seed: int) -> Asked:
    """Draw at most ``most`` queries, in their order."""
    count = len(all_asked.queries)
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:most]).tolist()
    return Asked(*([column[row] for row in chosen] for column in all_asked))  # type: ignore[arg-type]


def count_hits(answer: Answer, queries: Asked, vectors: np.ndarray) -> np.ndarray:
    """Count the annotated entities among the ten best of each query, float64 ``(Q,)``."""
    return np.array(
        [
            len(relevant & set(answer(text, vector)))
            for text, vector, relevant in zip(
                queries.queries, vectors, queries.relevant, strict=True
            )
        ],
        np.float64,
    )


def cpu_per_query(answer: Answer, texts: Sequence[str], vectors: np.ndarray) -> list[float]:
    """Return CPU microseconds a query of the whole process, p50 and p99, after a warm-up."""
    times = []
    for text, vector in [*zip(texts, vectors, strict=True)] * 2:
        start = time.process_time_ns()
        answer(text, vector)
        times.append(time.process_time_ns() - start)
    return [round(float(np.quantile(times[len(texts) :], q)) / 1e3, 1) for q in (0.5, 0.99)]


def best_setting(peer: Peer, corpus: Corpus, queries: Asked, vectors: np.ndarray) -> Choice:
    """Choose a peer's tokeniser with the first ranker, then its ranker, by what they find.

    Args:
        peer: Which.
        corpus: What it indexes.
        queries: Dev queries.
        vectors: Theirs, float32 ``(Q, D)``.
    """
    recalls: dict[str, float] = {}
    total = max(1, sum(len(rows) for rows in queries.relevant))

    def recall(index: Hybrid, tokeniser: str, ranker: Ranker) -> float:
        name = f"{tokeniser}, {ranker}"
        found = count_hits(_answer_of(index, ranker), queries, vectors).sum() / total
        recalls[name] = round(float(found), 4)
        return recalls[name]

    kept, split = peer.build(corpus, peer.tokenisers[0]), peer.tokenisers[0]
    most = recall(kept, split, RANKERS[0])
    for tokeniser in peer.tokenisers[1:]:
        other = peer.build(corpus, tokeniser)
        found = recall(other, tokeniser, RANKERS[0])
        if found > most:
            other, kept, split, most = kept, other, tokeniser, found
        other.close()
    ranker = max(RANKERS, key=lambda ranker: recall(kept, split, ranker))
    return Choice(kept, split, ranker, recalls)


def _answer_of(index: Hybrid, ranker: Ranker) -> Answer:
    return lambda text, vector: index.search(text, vector, ranker)


def two_leg_weights(cases: Cases) -> tuple[float, float, float]:
    """Choose the weights of vectors and words alone, with most hits."""
    scores = np.concatenate([case.scores for case in cases.cases])
    dense, words = (max(float(scores[:, leg].std()), 1e-9) for leg in (0, 1))
    tried = [((1 - share) / dense, share / words, 0.0) for share in SHARES]
    return max(tried, key=lambda weights: float(hits(cases, weights).sum()))


def our_answers(
    legs: FusedIndex, calibration: Cases, pooled: Cases | None
) -> dict[str, tuple[Answer, list[float]]]:
    """Fit both of ours on held-back train queries: with votes and without, and their weights."""
    more = [] if pooled is None else pooled.cases
    fusion = fit_fusion(calibration.cases, "held-back train queries", more)
    without = FusedIndex(legs.entities)
    all_cases = Cases(
        [*calibration.cases, *more],
        np.concatenate([calibration.positives, *([] if pooled is None else [pooled.positives])]),
    )
    fitted = FusedIndex(legs.entities, legs.queries, legs.votes, fusion)
    return {
        OURS: (_fused(fitted, fusion.weights), list(fusion.weights)),
        WITHOUT_VOTES: (_fused(without, pair := two_leg_weights(all_cases)), list(pair)),
    }


def _fused(legs: FusedIndex, weights: tuple[float, float, float]) -> Answer:
    def answer(text: str, vector: np.ndarray) -> list[int]:
        found = legs.search(legs.query(text, vector), K, weights=weights)
        rows: list[int] = legs.entities.ids.rows_of(found.ids).tolist()
        return rows

    return answer


def dense_answer(legs: FusedIndex) -> Answer:
    """Answer by vectors alone."""

    def answer(text: str, vector: np.ndarray) -> list[int]:
        rows: list[int] = legs.entities.ids.rows_of(legs.entities.search(vector, K).ids).tolist()
        return rows

    return answer


class Sizes(NamedTuple):
    """How much is measured."""

    tuning: int
    """Dev queries of a type on which peers' settings are chosen."""
    measured: int
    """Most queries of a type."""


def measure_type(
    answers: Mapping[str, Answer], queries: Asked, vectors: np.ndarray
) -> dict[str, Any]:
    """Measure systems on the same queries, each less our fused answers."""
    counts = np.array([len(rows) for rows in queries.relevant], np.float64)
    sums = {}
    for name, answer in answers.items():
        with stage(f"{name}: {len(counts):,} queries"):
            sums[name] = QuerySums(count_hits(answer, queries, vectors), counts)
    timed = slice(0, TIMED)
    return {
        "queries": len(counts),
        "pairs": int(counts.sum()),
        "systems": {
            name: {
                "recall_at_10": [round(float(x), 4) for x in bootstrap_interval(own)],
                "ours_less_this": [
                    round(float(x), 4) for x in paired_difference(sums[OURS], own).difference
                ],
                "cpu_us_p50_p99": cpu_per_query(
                    answers[name], queries.queries[timed], vectors[timed]
                ),
            }
            for name, own in sums.items()
        },
    }


def measure(
    dataset: Dataset, tower: Tower, peers: Sequence[Peer], split: str, sizes: Sizes
) -> dict[str, Any]:
    """Build and fit ours, choose the peers' settings, measure all; by entity type."""
    legs = build_legs(dataset, tower, 50, build_known(dataset, tower))
    calibration = {}
    for entity_type, index in legs.items():
        with stage(f"{entity_type}: held-back queries"):
            held = asked(dataset, entity_type, "validation", index.entities)
            calibration[entity_type] = score_texts(index, tower, held.queries, held.relevant)
    found: dict[str, Any] = {}
    for entity_type, index in legs.items():
        rows = dataset.of_type(entity_type)
        texts = entity_texts(with_engaged_queries(rows, dataset.pairs, 50))
        corpus = Corpus(
            texts, tower.entities(with_engaged_queries(rows, dataset.pairs, 20)).astype(np.float32)
        )
        pooled = calibration[POOLED[entity_type]] if entity_type in POOLED else None
        ours = our_answers(index, calibration[entity_type], pooled)
        answers: dict[str, Answer] = {name: answer for name, (answer, _) in ours.items()}
        answers["vectors alone"] = dense_answer(index)
        settings: dict[str, Any] = {name: weights for name, (_, weights) in ours.items()}
        tuning = sample_queries(asked(dataset, entity_type, DEV, index.entities), sizes.tuning, 0)
        tuning_vectors = tower.queries(tuning.queries)
        for peer in peers:
            with stage(f"{entity_type}: {peer.name}, settings"):
                choice = best_setting(peer, corpus, tuning, tuning_vectors)
            answers[peer.name] = _answer_of(choice.built, choice.ranker)
            settings[peer.name] = {
                "chosen": f"{choice.tokeniser}, {choice.ranker}",
                "dev_recall_at_10": choice.recalls,
            }
        queries = sample_queries(
            asked(dataset, entity_type, split, index.entities), sizes.measured, 1
        )
        figures = measure_type(answers, queries, tower.queries(queries.queries))
        found[entity_type] = {**figures, "settings": settings}
    return found


def installed_peers(names: Sequence[str]) -> list[Peer]:
    """Return the peers of those names that can be built; the others are named on the terminal."""
    missing = [name for name in names if not PEERS[name].is_installed]
    if missing:
        say(f"left out, not installed: {', '.join(missing)} (pip install 'omnisearchsage[hybrid]')")
    return [PEERS[name] for name in names if name not in missing]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(sorted(PEERS)),
    help="Only these. Repeatable; all that are installed by default.",
)
@click.option(
    "--tuning-queries",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Dev queries of a type on which a peer's tokeniser and ranker are chosen.",
)
@click.option(
    "--most-queries",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Most queries of a type that are measured.",
)
@click.option(
    "--release",
    is_flag=True,
    help="Measure the test half of the held-out queries, for the record of a release.",
)
@click.option("--name", default="hybrid", show_default=True, help="Slug of the record.")
@out_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    peers: tuple[str, ...],
    tuning_queries: int,
    most_queries: int,
    release: bool,
    name: str,
    out: Path,
    as_json: bool,
) -> None:
    """Labelled Recall@10 and CPU time of fused answers beside LanceDB, Milvus Lite and bm25s.

    Texts and vectors are the same: BUNDLE's, else multilingual USE on both sides. The pairs are
    human annotations standing in for engagement, not clicks. Needs the extra ``hybrid``; what is
    not installed is left out.

    Example: omni bench hybrid --most-queries 300
    """
    if release:
        require_clean_tree(out)
    chosen = installed_peers(peers or tuple(PEERS))
    tower = make_tower(bundle)
    dataset = held_back(load_sample(engaged_queries=0, images=False))
    split = TEST if release else DEV
    found = measure(dataset, tower, chosen, split, Sizes(tuning_queries, most_queries))
    path = write_record(
        name,
        Measurement(
            dataset={"name": dataset.name, "real": True, "note": dataset.label},
            config={
                "tower": tower.name,
                "split": split,
                "depth": DEPTH,
                "ef": EF,
                "rankers": [str(ranker) for ranker in RANKERS],
                "tuning_queries": tuning_queries,
                "held_back": f"1 train query in {HELD_BACK_OF}",
            },
            protocol={
                "metric": f"labelled Recall@10 of held-out ({split}) pairs within the entity type",
                "interval": "bootstrap over queries, 95%; differences paired",
                "choices": "ours on held-back train queries, the peers' on dev queries",
                "clock": "CPU time of the whole process, one query at a time, all threads",
            },
            metrics=found,
            libraries=("numpy", "polars", *(name for peer in chosen for name in peer.packages)),
        ),
        folder=out,
    )
    if as_json:
        print_json(found)
        return
    for entity_type, figures in found.items():
        _print(entity_type, figures, split)
    say(f"record: {path.name}")


def _print(entity_type: str, figures: dict[str, Any], split: str) -> None:
    rows = []
    for name, own in figures["systems"].items():
        setting = figures["settings"].get(name, "")
        rows.append(
            [
                name,
                "{:.3f} [{:.3f}, {:.3f}]".format(*own["recall_at_10"]),
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*own["ours_less_this"]),
                own["cpu_us_p50_p99"][0],
                setting["chosen"] if isinstance(setting, dict) else "",
            ]
        )
    print_table(
        f"{entity_type}: {figures['pairs']:,} {describe_split(split)} pairs (annotations)",
        ["system", "labelled Recall@10", "ours less this", "CPU us p50", "chosen on dev"],
        rows,
    )
