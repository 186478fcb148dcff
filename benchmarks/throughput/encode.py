"""``omni bench encode``: rows to vectors, hash embedding beside PyTorch's, single queries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import polars as pl
import torch
from torch.nn import functional

from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    peak_memory_mib,
    print_json,
    print_table,
    say,
)
from encoders.datasets.dataset import load_dataset
from encoders.inference.batch_embedding import EmbedConfig, EntityEmbedder, content_hashes
from encoders.inference.onnx_forms import Encode, ReadTexts, export_forms, onnx_encode
from encoders.tables.stream import stream_catalogue
from encoders.towers.entity_features import EntityFeatureConfig, EntityFeaturizer
from encoders.towers.entity_tower import EntityEncoder, create_entity_encoder
from encoders.towers.hash_embedding import sum_bags
from encoders.towers.pretrained_models import create_query_encoder
from encoders.towers.query_tower import QueryEncoder, pad

WORDS_PER_TEXT = 30
VECTORS = {"visual": 1024, "pinsage": 256, "itemsage": 256}
TARGETS = {"tokenise": 15_000, "text only": 10_000, "full width": 6_000}
"""Target of entities per second: tokenising on one core, embedding on two."""
QUERY_TOKENS = 16
"""Longest query, in tokens, of the one-at-a-time figures."""
INT8_TARGET = 0.5
"""Target: the largest p50 of the int8 form, relative to eager torch fp32."""


@dataclass(frozen=True)
class Timing:
    """Median of several runs over the same rows."""

    rows: int
    wall_seconds: float
    cpu_seconds: float

    def as_dict(self) -> dict[str, float]:
        """Return rows per wall second and per CPU second (what one free core would do)."""
        return {
            "rows_per_second": round(self.rows / self.wall_seconds),
            "rows_per_core_second": round(self.rows / self.cpu_seconds),
            "wall_seconds": round(self.wall_seconds, 4),
            "cpu_seconds": round(self.cpu_seconds, 4),
        }


def timed(function: Callable[[], object], rows: int, repeats: int) -> Timing:
    """Run once to warm up, then ``repeats`` times; medians."""
    function()
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Timing(rows, float(np.median(walls)), float(np.median(cpus)))


def make_rows(titles: list[str], rows: int, seed: int = 0) -> pl.DataFrame:
    """Make simulated rows: ``WORDS_PER_TEXT`` real title words each, and random vectors."""
    rng = np.random.default_rng(seed)
    words = np.array(" ".join(titles).split())
    texts = [
        " ".join(row) for row in words[rng.integers(0, len(words), (rows, WORDS_PER_TEXT))].tolist()
    ]
    vectors = {
        name: pl.Series(name, rng.standard_normal((rows, width), dtype=np.float32)).arr.to_list()
        for name, width in VECTORS.items()
    }
    return pl.DataFrame(
        {
            "id": [f"e{i}" for i in range(rows)],
            "entity_type": ["pin"] * rows,
            "title": texts,
            **vectors,
        }
    )


def measure_towers(
    towers: dict[str, EntityEncoder], rows: pl.DataFrame, threads: int, repeats: int
) -> dict[str, Any]:
    """Time rows to vectors per tower, device, precision, with the least cosine to CPU float32."""
    found: dict[str, Any] = {}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name, tower in towers.items():
        reference = tower.encode(rows[:512])
        for device in devices:
            for precision in ("fp32", "bf16"):
                embedder = EntityEmbedder(
                    tower, EmbedConfig(device=device, precision=precision, threads=threads)
                )
                timing = timed(partial(embedder, rows), rows.height, repeats)
                cosine = float((embedder(rows[:512]) * reference).sum(1).min())
                found[f"{name} {device} {precision}"] = timing.as_dict() | {
                    "min_cosine_to_fp32": round(cosine, 6)
                }
                say(f"{name} {device} {precision}: {found[f'{name} {device} {precision}']}")
    return found


def measure_hash_embedding(
    tower: EntityEncoder, rows: pl.DataFrame, repeats: int
) -> dict[str, Any]:
    """Time forward and backward of 1,024 weighted bags beside ``embedding_bag``, one thread."""
    assert tower.featurizer is not None, "made with one"
    features = tower.featurizer(rows[:1024])
    ids = features.token_ids
    table_rows = tower.rows[ids].reshape(-1)
    offsets = (features.offsets * 2).to(table_rows.dtype)
    upstream = torch.randn(len(offsets) - 1, tower.config.token_dimension)

    def step(bags: Callable[..., torch.Tensor]) -> None:
        tower.zero_grad(set_to_none=True)
        weights = functional.embedding(ids, tower.token_weights).reshape(-1)
        (bags(tower.table, table_rows, weights, offsets) * upstream).sum().backward()

    def stock(
        table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        return functional.embedding_bag(
            indices, table, offsets[:-1], mode="sum", per_sample_weights=weights
        )

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = (
            timed(lambda: step(sum_bags), 1024, repeats),
            timed(lambda: step(stock), 1024, repeats),
        )
    finally:
        torch.set_num_threads(before)
    return {
        "ours_cpu_ms": round(ours.cpu_seconds * 1e3, 2),
        "pytorch_cpu_ms": round(theirs.cpu_seconds * 1e3, 2),
        "ratio": round(theirs.cpu_seconds / ours.cpu_seconds, 2),
    }


def measure_streaming(tower: EntityEncoder, rows: pl.DataFrame, threads: int) -> dict[str, Any]:
    """Time a Parquet file to vectors, checks and hashes included, as ``omni embed`` does."""
    embedder = EntityEmbedder(tower, EmbedConfig(threads=threads, device="cpu", precision="bf16"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "catalogue.parquet"
        rows.write_parquet(path)

        def run() -> None:
            for chunk in stream_catalogue([path]):
                content_hashes(chunk, embedder.featurizer.config)
                embedder(chunk)

        return timed(run, rows.height, 3).as_dict()


def _of_token_ids(encode: Encode) -> Callable[[list[list[int]]], np.ndarray]:
    """Make a form take token ids, for a tower that reads nothing else."""
    return lambda token_ids: encode(ReadTexts(token_ids))


def measure_queries(tower: QueryEncoder, texts: list[str], rounds: int) -> dict[str, Any]:
    """Return milliseconds of one query at batch 1 on one thread, tokenising excluded.

    A query of at most 16 tokens, by torch fp32 and both exported forms.

    They take turns on every query, so that whatever else the machine does falls on all of them.
    ``transformers-fp32`` is the same tower through the library's own forward pass, which computes
    every token's last state.
    """
    tower.eval()
    token_ids = [ids for ids in tower.tokenize(texts) if len(ids) <= QUERY_TOKENS][:rounds]

    @torch.inference_mode()
    def eager(ids: list[list[int]]) -> np.ndarray:
        vectors: np.ndarray = tower(*pad(ids, tower.pad_id)).numpy()
        return vectors

    @torch.inference_mode()
    def library(ids: list[list[int]]) -> np.ndarray:
        rows, mask = pad(ids, tower.pad_id)
        state = tower.transformer(input_ids=rows, attention_mask=mask).last_hidden_state[:, 0]
        vectors: np.ndarray = functional.normalize(tower.projection(state), dim=-1).numpy()
        return vectors

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder:
            reports = {
                report.form_id: report for report in export_forms(tower, Path(folder), texts[:2000])
            }
            forms = {
                name: _of_token_ids(onnx_encode(Path(folder) / report.file))
                for name, report in reports.items()
            }
            systems: dict[str, Callable[[list[list[int]]], np.ndarray]] = {
                "transformers-fp32": library,
                "torch-fp32": eager,
                **forms,
            }
            times: dict[str, list[int]] = {name: [] for name in systems}
            for turn in range(2):  # the first turn warms up
                for ids in token_ids:
                    for name, encode in systems.items():
                        start = time.perf_counter_ns()
                        encode([ids])
                        if turn:
                            times[name].append(time.perf_counter_ns() - start)
    finally:
        torch.set_num_threads(before)
    base = float(np.median(times["torch-fp32"]))
    return {
        name: {
            "p50_ms": round(float(np.median(taken)) / 1e6, 4),
            "p99_ms": round(float(np.percentile(taken, 99)) / 1e6, 4),
            "p50_relative_to_torch": round(float(np.median(taken)) / base, 4),
            "queries": len(taken),
            "least_cosine": round(reports[name].cosine_min, 5) if name in reports else 1.0,
        }
        for name, taken in times.items()
    }


@click.command(name="encode")
@click.option(
    "--rows", type=click.IntRange(1024), default=4_096, show_default=True, help="Entities per run."
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Runs per figure, after one to warm up; medians.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="CPU worker threads for the towers.",
)
@data_option
@json_option
@handle_errors
def command(rows: int, repeats: int, threads: int, data_dir: Path | None, as_json: bool) -> None:
    """Measure entity embedding: tokeniser, text only, full width (1,536 continuous), fp32 and bf16.

    Tokenising is included.

    Then the shipped query tower, one real query at a time: torch fp32 and its ONNX forms, in turn,
    on one thread. The towers have the paper's size (100,000 x 256 table, MLP 1024-1024-256) and
    random weights: speed does not depend on them. Beside the rows per second of the clock stand the
    rows per second of processor time, which other work on the machine disturbs less.

    Example: omni bench encode --data data
    """
    data = load_dataset(data_dir)
    fitted = EntityFeaturizer.fit(data.catalogue, EntityFeatureConfig())
    frame = make_rows(data.catalogue["title"].drop_nulls().to_list(), rows)
    full = EntityFeaturizer(EntityFeatureConfig(continuous=VECTORS), fitted.vocabulary)
    ngrams = len(fitted(frame[:1024]).token_ids) / 1024
    say(f"{data.name}: vocabulary {len(fitted.vocabulary):,}, {ngrams:.0f} known n-grams per row")

    texts = frame["title"].to_list()
    tokenise = timed(lambda: fitted.vocabulary.tokenize(texts), rows, repeats).as_dict()
    towers = {"text only": create_entity_encoder(fitted), "full width": create_entity_encoder(full)}
    measured = measure_towers(towers, frame, threads, repeats)
    hash_embedding = measure_hash_embedding(towers["text only"], frame, repeats)
    streaming = measure_streaming(towers["full width"], frame, threads)

    queries = measure_queries(
        create_query_encoder(),
        data.split("heldout")["query"].unique(maintain_order=True).to_list(),
        1_000,
    )

    figures = {
        "tokenise": tokenise,
        **measured,
        "full width from Parquet, checked, hashed, cpu bf16": streaming,
    }
    path = write_record(
        "encode",
        Measurement(
            dataset={
                "name": data.name,
                "kind": "simulated rows: real title words in random order, random vectors",
                "ngrams_per_row": round(ngrams, 1),
            },
            config={
                "rows": rows,
                "words_per_text": WORDS_PER_TEXT,
                "continuous": VECTORS,
                "threads": threads,
                "vocabulary": len(fitted.vocabulary),
            },
            protocol={
                "warm_up": 1,
                "repeats": repeats,
                "clock": "perf_counter and process_time",
                "load_average_1m": os.getloadavg()[0],
            },
            metrics={
                "figures": figures,
                "query_at_batch_1": queries,
                "hash_embedding_forward_backward_1024_rows": hash_embedding,
                "peak_memory_mib": round(peak_memory_mib(), 1),
            },
            libraries=("torch", "numpy", "polars", "onnxruntime"),
        ),
    )
    if as_json:
        print_json(
            {
                "record": str(path),
                "figures": figures,
                "query_at_batch_1": queries,
                "hash_embedding": hash_embedding,
            }
        )
        return
    table = [
        (
            name,
            values["rows_per_second"],
            values["rows_per_core_second"],
            values.get("min_cosine_to_fp32"),
            next((t for n, t in TARGETS.items() if name.startswith(n)), None),
        )
        for name, values in figures.items()
    ]
    load = f"{threads} threads, load {os.getloadavg()[0]:.1f}"
    title = (
        f"Entities per second (simulated rows of {data.name} words, {ngrams:.0f} n-grams each);"
        f" {load}"
    )
    print_table(
        title,
        [
            "what",
            "rows/s (clock)",
            "rows/s per core",
            "least cosine to fp32",
            "target (2 cores; tokenise: 1)",
        ],
        table,
    )
    rows_of_queries = [
        (
            name,
            f["p50_ms"],
            f["p99_ms"],
            f["p50_relative_to_torch"],
            f["least_cosine"],
            INT8_TARGET if name == "onnx-int8" else None,
        )
        for name, f in queries.items()
    ]
    print_table(
        f"One real query at a time, at most {QUERY_TOKENS} tokens, one thread, tokenising excluded",
        ["form", "p50 ms", "p99 ms", "p50 of torch's", "least cosine", "target"],
        rows_of_queries,
    )
    say(f"hash embedding, forward and backward: {hash_embedding}; record {path}")
