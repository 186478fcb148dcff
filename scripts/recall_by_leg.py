"""Print labelled Recall@10 of a running release by leg, on the test half of held-out pairs.

    omni serve --store search/store &
    python scripts/recall_by_leg.py search/data/pairs.parquet --type package

Weights of fused answers are fitted on the other half. Over gRPC, so with what is served.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from encoders.datasets.halves import TEST, rows_of_split
from encoders.evaluation.metrics import QuerySums, paired_difference
from retrieval import RetrievalClient

LEGS: dict[str, bool | tuple[float, float, float]] = {
    "dense": False,
    "lexical": (0.0, 1.0, 0.0),
    "votes": (0.0, 0.0, 1.0),
    "fused": True,
}
K = 10


def count_hits(client: RetrievalClient, asked: pl.DataFrame, kind: str) -> dict[str, np.ndarray]:
    """Count the paired entities among the ten best of each query, by leg; float64 ``(Q,)``."""
    hits: dict[str, list[float]] = {leg: [] for leg in LEGS}
    for query, own in asked.select("query", "entity_id").iter_rows():
        for leg, fusion in LEGS.items():
            answer = client.retrieve(query, kind, K, fusion=fusion, deadline_seconds=30)
            hits[leg].append(float(len(set(answer.ids) & set(own))))
    return {leg: np.array(counts) for leg, counts in hits.items()}


def main() -> None:
    """Ask every query of the half by every leg, and print recall, by language too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pairs", type=Path, help="Parquet file of pairs with held-out ones")
    parser.add_argument("--type", required=True, help="entity type")
    parser.add_argument("--server", default="localhost:50051")
    parser.add_argument("--most", type=int, default=2_000, help="queries at most")
    given = parser.parse_args()
    asked = (
        rows_of_split(pl.read_parquet(given.pairs, glob=False), TEST)
        .filter(pl.col("entity_type") == given.type)
        .group_by("query", maintain_order=True)
        .agg(pl.col("language").first(), pl.col("entity_id").unique())
        .sample(fraction=1.0, shuffle=True, seed=7)
        .head(given.most)
    )
    with RetrievalClient(given.server) as client:
        client.wait_until_ready(60)
        hits = count_hits(client, asked, given.type)
    positives = asked["entity_id"].list.len().to_numpy().astype(np.float64)
    total = {leg: round(float(counts.sum() / positives.sum()), 3) for leg, counts in hits.items()}
    print(f"all, {asked.height:,} queries, {int(positives.sum()):,} pairs: {total}")
    gain = paired_difference(
        QuerySums(hits["fused"], positives), QuerySums(hits["dense"], positives)
    ).difference
    print("fused less dense:", [round(float(value), 3) for value in gain])
    languages = asked["language"].to_numpy()
    for language, count in asked["language"].value_counts(sort=True).iter_rows():
        mask = languages == language
        of_it = {
            leg: round(float(counts[mask].sum() / positives[mask].sum()), 3)
            for leg, counts in hits.items()
        }
        print(f"{language}, {count:,} queries: {of_it}")


if __name__ == "__main__":
    main()
