"""The ``omni bench`` group: a table of benchmarks whose modules load only when they are called.

Add a benchmark: add a line.
"""

from __future__ import annotations

import click

from encoders.commands.lazy_group import LazyGroup

BENCHES: dict[str, tuple[str, str]] = {
    "train": (
        "benchmarks.throughput.train:command",
        "Training pairs/s and quality against Sentence-Transformers, side by side.",
    ),
    "ann": (
        "benchmarks.index.ann:command",
        "Queries/s at equal ANN recall: our call, the libraries under it, the best peers.",
    ),
    "filter": (
        "benchmarks.index.filter:command",
        "Filtered search at every selectivity, with and against the query, next to qdrant-edge.",
    ),
    "recall-contract": (
        "benchmarks.index.recall_contract:command",
        "Claimed against true recall: every plan, on real vectors and on hard ones.",
    ),
    "recall": (
        "benchmarks.quality.recall:command",
        "Labelled Recall@10 of a bundle and the baselines, by entity type and language.",
    ),
    "fusion": (
        "benchmarks.quality.fusion:command",
        "Labelled Recall@10 and time of vectors, words and neighbouring queries, alone and fused.",
    ),
    "hybrid": (
        "benchmarks.quality.hybrid:command",
        "Fused answers beside hybrid search of LanceDB, Milvus Lite and bm25s with hnswlib.",
    ),
    "words": (
        "benchmarks.index.words:command",
        "Time, size and exactness of the index of words, on up to 820,000 real texts.",
    ),
    "encode": (
        "benchmarks.throughput.encode:command",
        "Catalogue rows to vectors: tokeniser, text only, full width, fp32 and bf16.",
    ),
    "downstream": (
        "benchmarks.quality.downstream:command",
        "Frozen query vectors on hierarchical classification, against fastText (paper 5.4).",
    ),
    "durability": (
        "benchmarks.faults.durability:command",
        "kill -9 at random moments; damaged files: nothing lost, nothing accepted.",
    ),
    "build": (
        "benchmarks.index.build:command",
        "Release builds: time, peak memory, determinism, loading against sha256sum.",
    ),
    "rebuild": (
        "benchmarks.index.rebuild:command",
        "Incremental rebuilds: CPU time beside a full build, recall, latency, equal bytes.",
    ),
    "update": (
        "benchmarks.index.update:command",
        "Live upserts and deletes: recall, latency, visibility, sustained rate.",
    ),
    "pipeline": (
        "benchmarks.throughput.pipeline:command",
        "Simulated logs to pairs and features: time, memory, growth, daily update.",
    ),
    "enrichment": (
        "benchmarks.paper_tables.enrichment:command",
        "Text features one by one and captions with noise: the paper's tables 3 and 4.",
    ),
    "tables": (
        "benchmarks.paper_tables.tables:command",
        "The paper's tables 2, 5 and 6 and design questions, several seeds.",
    ),
    "text": (
        "benchmarks.quality.text_embedding:command",
        "Weights of an entity's texts in its frozen text embedding, on train queries alone.",
    ),
    "serve": (
        "benchmarks.serving.serve:command",
        "Our service beside a real Milvus and a bare gRPC echo, same vectors and cores.",
    ),
    "latency": (
        "benchmarks.serving.latency:command",
        "Percentiles of a running server with and without the cache, per stage.",
    ),
    "fuzz": (
        "benchmarks.faults.fuzz:command",
        "Malformed requests by the hundred thousand: no crash, no hang, typed errors only.",
    ),
    "cache": (
        "benchmarks.serving.cache:command",
        (
            "Query cache on simulated Zipf traffic: TTL x size, ages, encoder changes, the paper's"
            " scale."
        ),
    ),
    "faults": (
        "benchmarks.faults.faults:command",
        "Swaps, overload, a page beside batches, kill -9, bad Redis: no lost or failed answer.",
    ),
    "hostile": (
        "benchmarks.faults.hostile:command",
        "Floods, bombs and fuzzed frames on one connection: what a good client beside it notices.",
    ),
    "diversity": (
        "benchmarks.quality.diversity:command",
        "MMR: intra-list similarity against labelled Recall@10 as lambda moves, one plot.",
    ),
}
"""Name -> (module:attribute of a click command, one line of help)."""


@click.command(
    cls=LazyGroup, table=BENCHES, context_settings={"help_option_names": ["-h", "--help"]}
)
def group() -> None:
    """Run a benchmark: each prints a table and writes one JSON record.

    Example: omni bench recall --data data
    """
