"""``omni bench diversity``: intra-list similarity against Recall@10 as MMR's lambda moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.record import RESULTS, Measurement, write_record
from encoders.commands.console import (
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
    track,
)
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex
from retrieval.rerank import rerank
from retrieval.service.searcher import POOL_FACTOR

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def intra_list_similarity(vectors: np.ndarray) -> float:
    """Return the mean cosine over all pairs of rows of ``vectors`` (n, D); 0 for fewer than two."""
    n = len(vectors)
    if n < 2:
        return 0.0
    total = vectors.sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def pools_of(
    index: EntityIndex, queries: np.ndarray, k: int
) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
    """Per query the re-ranking pool: ids, scores ``(4k,)`` and vectors ``(4k, D)``."""
    pools = []
    for query in track(list(queries), "search"):
        result = index.search(query, POOL_FACTOR * k)
        vectors = np.stack(
            [vector for id_ in result.ids if (vector := index.vector(id_)) is not None]
        )
        pools.append((list(result.ids), np.asarray(result.scores, dtype=np.float32), vectors))
    return pools


def curve(
    pools: Sequence[tuple[list[str], np.ndarray, np.ndarray]], relevant: Sequence[set[str]], k: int
) -> list[dict[str, float]]:
    """Return Recall@k per pair, its standard error, and intra-list similarity by lambda."""
    points = []
    for trade_off in LAMBDAS:
        found, wanted, similar = [], [], []
        for (ids, scores, vectors), labels in zip(pools, relevant, strict=True):
            rows = rerank(scores, vectors, k, trade_off, None)
            found.append(len({ids[row] for row in rows} & labels))
            wanted.append(len(labels))
            similar.append(intra_list_similarity(vectors[rows]))
        hits, pairs = np.array(found, dtype=float), np.array(wanted, dtype=float)
        recall = hits.sum() / pairs.sum()
        error = float(
            np.sqrt(np.sum((hits - recall * pairs) ** 2)) / pairs.sum()
        )  # ratio estimator, queries as clusters
        points.append(
            {
                "lambda": trade_off,
                "recall": round(float(recall), 4),
                "recall_ci95": round(1.96 * error, 4),
                "intra_list_similarity": round(float(np.mean(similar)), 4),
            }
        )
    return points


def labelled_queries(
    entity_type: str, known: set[str], count: int, seed: int
) -> tuple[list[str], list[set[str]]]:
    """Held-out dev queries of the sample data with the annotated entities that are in the index."""
    from encoders.datasets.dataset import load_sample
    from encoders.datasets.halves import DEV, rows_of_split

    pairs = load_sample(engaged_queries=0, images=False).pairs
    chosen = rows_of_split(pairs.filter(pairs["entity_type"] == entity_type), DEV)
    labels: dict[str, set[str]] = {}
    for query, entity in zip(chosen["query"].to_list(), chosen["entity_id"].to_list(), strict=True):
        if entity in known:
            labels.setdefault(query, set()).add(entity)
    texts = sorted(labels)
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[i] for i in order], [labels[texts[i]] for i in order]


def plot(points: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw the curve, one labelled dot per lambda, with the 95% interval of recall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6), dpi=130)
    x = [p["intra_list_similarity"] for p in points]
    axes.errorbar(
        x,
        [p["recall"] for p in points],
        yerr=[p["recall_ci95"] for p in points],
        marker="o",
        color="#b5123c",
        ecolor="#d9a3b0",
        capsize=2,
    )
    for p in points:
        axes.annotate(
            f"{p['lambda']:g}",
            (p["intra_list_similarity"], p["recall"]),
            textcoords="offset points",
            xytext=(6, -11),
            fontsize=8,
        )
    axes.set_xlabel("intra-list similarity of the top 10 (mean cosine; less is more varied)")
    axes.set_ylabel("labelled Recall@10")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="A store whose active release holds the sample.",
)
@click.option("--type", "entity_type", default="pin", show_default=True, help="Entity type.")
@click.option("--count", default=2000, show_default=True, help="Held-out queries.")
@click.option(
    "-k",
    default=10,
    show_default=True,
    help="Results per query; the pool holds four times as many.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses the queries.")
@json_option
@handle_errors
def command(store: Path, entity_type: str, count: int, k: int, seed: int, as_json: bool) -> None:
    """Trade relevance for variety: Recall@10 and intra-list similarity for twelve values of lambda.

    Example: omni bench diversity --store demo/store
    """
    from encoders.towers.query_tower import QueryEncoder

    with ReleaseStore(store).open_current() as release:
        index = release.entity(entity_type)
        texts, relevant = labelled_queries(entity_type, set(index.ids), count, seed)
        if not texts:
            fail(
                f"expected the sample's {entity_type} entities in the release, but none is there."
                " Build it with `omni demo`."
            )
        with stage(f"encode {len(texts):,} queries"):
            vectors = QueryEncoder.load(release.query_encoder_path).encode(texts)
        points = curve(pools_of(index, vectors, k), relevant, k)
        facts = {
            "release_id": release.release_id,
            "space_id": release.space_id,
            "entities": index.count,
        }
    path = write_record(
        "diversity",
        Measurement(
            dataset={
                "name": "sample, held-out queries (annotations, not clicks)",
                "real": True,
                "entity_type": entity_type,
                "queries": len(texts),
                "pairs": sum(map(len, relevant)),
                **facts,
            },
            config={"k": k, "pool": POOL_FACTOR * k, "lambdas": LAMBDAS, "seed": seed},
            protocol={"interval": "95%, queries as clusters"},
            metrics={"points": points},
            libraries=("numpy",),
        ),
    )
    title = (
        f"MMR over {index.count:,} {entity_type}s, {len(texts):,} held-out queries (annotations);"
        " dots: lambda"
    )
    plot(points, RESULTS / f"{path.stem}.png", title)
    if as_json:
        print_json(points)
        return
    rows = [
        [p["lambda"], p["recall"], p["recall_ci95"], p["intra_list_similarity"]] for p in points
    ]
    print_table(title, ["lambda", f"labelled Recall@{k}", "± 95%", "intra-list similarity"], rows)
    say(f"record: {path.name}, plot: {path.stem}.png")
