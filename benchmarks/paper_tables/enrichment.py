"""``omni bench enrichment``: what each text feature adds and when captions help (tables 3, 4).

Real text, no clicks: pins are emoji pictures, pairs are human keywords and translations standing in
for engagement. Continuous features are thumbnails of the pictures. Half of the pins have lost their
title and got it back as the caption; noise replaces captions by those of other pins. Table 3 counts
the pins without a title, as the paper does. Every (setting, seed) is one training whose result is
one small file, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl

from benchmarks.paper_tables.seed_study import Job, interval, read_results, result_path, run_missing
from benchmarks.record import Measurement, write_record
from encoders.commands.console import handle_errors, json_option, print_json, print_table, say
from encoders.datasets.dataset import Dataset, load_sample
from encoders.enrichment.captions import decode_image

LABEL = (
    "REAL text: human keywords and translations of emoji, standing in for engagement; not clicks"
)
FIELDS = {
    "titles": "title",
    "captions": "caption",
    "board titles": "board_titles",
    "engaged queries": "engaged_queries",
}
"""Text feature -> its catalogue column."""

CONTINUOUS = "continuous"
THUMBNAIL = 16
"""Pictures become 16 x 16 RGB thumbnails: 768 numbers."""

HIDDEN_TITLES = 0.5
"""Share of pins whose title is taken away; their caption is that title, or with caption noise
another pin's."""

NOISES = (0.0, 0.1, 0.3, 0.5)
WORSE = (0.75, 1.0)
"""Further noise where captions help most, to see where they stop to.

At 1.0 all that they can do is to tell pins apart.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row of a table."""

    table: str
    name: str
    features: tuple[str, ...]
    """Of ``CONTINUOUS`` and the keys of ``FIELDS``."""
    caption_noise: float = 0.0
    """Share of captions taken from another pin."""
    new_pins: bool = False
    """Half of the pins without a title are unknown to training (no pairs, no negatives), and only
    they count."""

    @property
    def key(self) -> str:
        """What the training depends on: rows of several tables with one key share their runs."""
        noise = f"-noise{self.caption_noise:.2f}" if "captions" in self.features else ""
        return (
            "+".join(sorted(name.replace(" ", "_") for name in self.features))
            + noise
            + ("-new" if self.new_pins else "")
        )

    @property
    def pins(self) -> str:
        """The pins that count: a key of a training's result."""
        return ("new" if self.new_pins else "hidden") if self.table.startswith("3") else "all"


ALL = (CONTINUOUS, *FIELDS)
TABLE_4 = (
    *(
        Setting(table="4", name=("+ " if n else "") + name, features=ALL[: n + 1])
        for n, name in enumerate(ALL)
    ),
    *(Setting(table="4 alone", name=f"{name} alone", features=(name,)) for name in ALL),
    *(
        Setting(
            table="4 left out", name=f"without {name}", features=tuple(f for f in ALL if f != name)
        )
        for name in ALL
    ),
)


def caption_rows(
    table: str,
    others: tuple[str, ...],
    noises: tuple[float, ...] = NOISES + WORSE,
    *,
    new_pins: bool = False,
) -> tuple[Setting, ...]:
    """No captions beside the features ``others``, then captions at each noise level."""
    both = tuple(name for name in ALL if name in (*others, "captions"))
    noisy = (
        Setting(
            table=table,
            name=f"captions, {n:.0%} wrong",
            features=both,
            caption_noise=n,
            new_pins=new_pins,
        )
        for n in noises
    )
    return (Setting(table=table, name="no captions", features=others, new_pins=new_pins), *noisy)


TABLE_3 = (
    *caption_rows("3", tuple(name for name in ALL if name != "captions"), NOISES),
    *caption_rows("3 without boards and queries", (CONTINUOUS, "titles")),
    *caption_rows("3 new pins", (CONTINUOUS, "titles"), new_pins=True),
)
"""With all features, as in the paper; without what engagement brings, for pins that training saw
and for pins that it did not."""


@click.command()
@click.option(
    "--work",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for one small result file per training; kept, reused.",
)
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(2), help="Trainings per setting."
)
@click.option("--steps", default=100, show_default=True, help="Optimiser steps per training.")
@click.option("--batch-pairs", default=320, show_default=True, help="Pairs per step.")
@click.option(
    "--train-pairs",
    default=40_000,
    show_default=True,
    help="Training pairs drawn (the same for every setting).",
)
@click.option("--max-queries", default=2_000, show_default=True, help="Held-out queries evaluated.")
@click.option(
    "--max-minutes",
    default=0.0,
    help="Start no training after this long; the tables then hold what is there. 0: no limit.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=click.Choice(["3", "4"]),
    help="Only this table; repeat. Default: both.",
)
@json_option
@handle_errors
def command(
    work: Path, seeds: int, tables: tuple[str, ...], max_minutes: float, as_json: bool, **sizes: int
) -> None:
    """Train with text features one by one, alone and left out, and with captions of rising noise.

    Labelled Recall@10 of held-out keywords against all pins, mean and 95% interval over seeds, and
    by language.

    Example: omni bench enrichment --work enrichment --seeds 3
    """
    settings = [s for s in (*TABLE_4, *TABLE_3) if not tables or s.table[0] in tables]
    work.mkdir(parents=True, exist_ok=True)
    pins = functools.cache(load_pins)

    def job(setting: Setting, seed: int) -> Job:
        path = result_path(work, setting.key, sizes, seed)
        return Job(
            path,
            f"{setting.name}, seed {seed}",
            lambda: train_and_evaluate(pins(), setting, seed, sizes),
        )

    run_missing(
        (
            job(setting, seed)
            for seed in range(seeds)
            for setting in {s.key: s for s in settings}.values()
        ),
        max_minutes,
    )
    rows = summarise(settings, work, seeds, sizes)
    missing = sum(row["seeds"] < seeds for row in rows)
    if not as_json:
        _print(rows)
        if missing:
            say(
                f"{missing} of {len(rows)} settings lack some of their {seeds} seeds: run the"
                " command again with the same --work to go on"
            )
    thresholds = {
        table: noise_threshold(rows, table)
        for table in dict.fromkeys(s.table for s in settings)
        if table.startswith("3")
    }
    metrics = {"rows": rows, "caption_noise_threshold": thresholds, "complete": not missing}
    path = write_record(
        "enrichment",
        Measurement(
            dataset={"name": "sample, pins", "simulated": False, "note": LABEL},
            config={
                "seeds": seeds,
                **sizes,
                "hidden_titles": HIDDEN_TITLES,
                "continuous": f"{THUMBNAIL}x{THUMBNAIL} RGB thumbnails",
            },
            protocol={
                "metric": "labelled Recall@10 over held-out pairs, exact, against all pins",
                "interval": "95%, Student's t over seeds",
                "gain": "seed by seed",
            },
            metrics=metrics,
            libraries=("torch", "polars"),
        ),
    )
    if as_json:
        print_json(metrics | {"record": str(path)})
    else:
        click.echo(path)


def load_pins() -> Dataset:
    """The pins of the sample with thumbnails in the column ``visual``."""
    sample = load_sample()
    pins = sample.of_type("pin")
    vectors = [
        _thumbnail(sample.images[i]) if i in sample.images else [0.0] * (3 * THUMBNAIL**2)
        for i in pins["id"].to_list()
    ]
    pins = pins.with_columns(pl.Series("visual", vectors, dtype=pl.List(pl.Float32)))
    return Dataset(
        pins, sample.pairs.filter(pl.col("entity_type") == "pin"), {}, sample.groups, "sample, pins"
    )


def _thumbnail(svg: str) -> list[float]:
    image = decode_image(svg.encode(), 4 * THUMBNAIL).resize((THUMBNAIL, THUMBNAIL))
    values: list[float] = (np.asarray(image, dtype=np.float32).ravel() / 127.5 - 1).tolist()
    return values


def apply_setting(catalogue: pl.DataFrame, setting: Setting, seed: int) -> pl.DataFrame:
    """Hide titles, return them as captions and spoil captions; add ``title_hidden`` and ``new``.

    The same seed hides the same titles.
    """
    rng = np.random.default_rng([seed, 7])
    n = catalogue.height
    places = rng.permutation(n)
    hidden = places < round(HIDDEN_TITLES * n)
    wrong = rng.permutation(n) < round(setting.caption_noise * n)
    titles = catalogue["title"].to_numpy()
    captions = np.where(wrong, titles[(np.arange(n) + 1 + rng.integers(0, n - 1, n)) % n], titles)
    return catalogue.with_columns(
        pl.Series("title", np.where(hidden, "", titles), dtype=pl.String),
        pl.Series("caption", np.where(hidden, captions, ""), dtype=pl.String),
        pl.Series("title_hidden", hidden),
        pl.Series("new", places < round(HIDDEN_TITLES * n / 2)),
    )


def train_and_evaluate(
    dataset: Dataset, setting: Setting, seed: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """One training with the setting's features, evaluated on held-out pairs."""
    from encoders.config.train_config import (
        BatchConfig,
        EntityTowerSettings,
        LossConfig,
        OptimiserConfig,
        TrainConfig,
        ValidationConfig,
    )
    from encoders.evaluation.ranking import TaskSettings, build_task, rank_task, vector_scores
    from encoders.towers.entity_features import EntityFeatureConfig
    from encoders.training.data.source_tables import TrainingData
    from encoders.training.loop import train

    catalogue = apply_setting(dataset.catalogue, setting, seed)
    fields = tuple(FIELDS[name] for name in setting.features if name in FIELDS) or (
        "entity_type",
    )  # the same word for every pin
    config = TrainConfig(
        steps=sizes["steps"],
        seed=seed,
        device="cpu",
        features=EntityFeatureConfig(
            text_fields=fields,
            continuous={"visual": 3 * THUMBNAIL**2} if CONTINUOUS in setting.features else {},
        ),
        entity_tower=EntityTowerSettings(table_rows=20_000, token_dimension=128, hidden=(512,)),
        batch=BatchConfig(
            pairs=sizes["batch_pairs"], cross_fit=4 if "engaged queries" in setting.features else 0
        ),
        loss=LossConfig(random_negatives=1.0),
        optimiser=OptimiserConfig(warmup_steps=sizes["steps"] // 6),
        validation=ValidationConfig(fraction=0.0),
    )
    new = catalogue.filter("new").select(entity_id="id")
    known = catalogue.filter(~pl.col("new")) if setting.new_pins else catalogue
    train_pairs = (
        dataset.split("train").join(new, on="entity_id", how="anti")
        if setting.new_pins
        else dataset.split("train")
    )
    drawn = train_pairs.sample(min(sizes["train_pairs"], train_pairs.height), seed=11)
    result = train(config, TrainingData(known, drawn), quiet=True)
    spoiled = Dataset(catalogue, dataset.pairs, {}, dataset.groups, dataset.name)
    task = build_task(spoiled, "pin", TaskSettings(max_queries=sizes["max_queries"], seed=5))
    encoder = result.entity_encoders["pin"]
    vectors = encoder.encode(task.candidates)
    ranking = rank_task(
        task, vector_scores(result.query_encoder.encode(task.queries), vectors), setting.name
    )
    hidden = catalogue.select("new", entity_id="id", hidden="title_hidden")
    frame = task.pairs.select("entity_id", "language", "kind").join(
        hidden, on="entity_id", how="left", maintain_order="left"
    )
    frame = frame.with_columns(pl.Series("hit", ranking.ranks <= 10))
    return {
        "all": shares(frame),
        "hidden": shares(frame.filter("hidden")),
        "new": shares(frame.filter("new")),
        "last_loss": result.metrics.get("loss"),
    }


def shares(frame: pl.DataFrame) -> dict[str, Any]:
    """Recall of pairs (``language, kind, hit``), and by language and kind of query."""
    parts = {
        name: frame.group_by(name).agg(pl.col("hit").mean()).sort(name).rows()
        for name in ("language", "kind")
    }
    return {
        "recall@10": frame["hit"].mean(),
        "pairs": frame.height,
        **{name: dict(rows) for name, rows in parts.items()},
    }


def summarise(
    settings: Sequence[Setting], work: Path, seeds: int, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """Return mean and interval of every setting over its seeds.

    Table 3 counts pins with hidden titles.
    """
    rows: list[dict[str, Any]] = []
    for setting in settings:
        pins = setting.pins
        by_seed = {
            seed: result[pins]
            for seed, result in read_results(work, setting.key, sizes, seeds).items()
        }
        present, results = list(by_seed), list(by_seed.values())
        values = [r["recall@10"] for r in results]
        rows.append(
            {
                "table": setting.table,
                "setting": setting.name,
                "caption_noise": setting.caption_noise if "captions" in setting.features else None,
                "pins": pins,
                "seeds": len(values),
                "mean": float(np.mean(values)) if values else None,
                "interval": interval(values),
                "values": values,
                "seed_numbers": present,
                "languages": _means([r["language"] for r in results]),
                "kinds": _means([r["kind"] for r in results]),
            }
        )
    for row, base in zip(rows, _bases(rows), strict=True):
        ours, theirs = (dict(zip(r["seed_numbers"], r["values"], strict=True)) for r in (row, base))
        gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        row |= {
            "against": base["setting"],
            "gain": float(np.mean(gains)) if gains else None,
            "gain_interval": interval(gains),
        }
    return rows


def _bases(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name the row that each row is compared with.

    Table 4: the row above it. A feature left out: all features. Otherwise: the first row.
    """
    full = [row for row in rows if row["table"] == "4"]
    bases = []
    for n, row in enumerate(rows):
        before = rows[n - 1] if n and rows[n - 1]["table"] == row["table"] else row
        first = next(r for r in rows if r["table"] == row["table"])
        bases.append(
            {"4": before, "4 left out": full[-1] if full else row}.get(row["table"], first)
        )
    return bases


def _means(parts: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Name -> mean and interval over the seeds."""
    values = {
        name: [part[name] for part in parts if name in part]
        for name in sorted({name for part in parts for name in part})
    }
    return {
        name: {"mean": float(np.mean(of)), "interval": interval(of)} for name, of in values.items()
    }


def noise_threshold(rows: Sequence[dict[str, Any]], table: str) -> float | None:
    """Return the share of wrong captions at which recall falls to that without captions.

    Linear between settings.

    None: at no level tried, or right captions make no difference beyond their interval.
    """
    chosen = [row for row in rows if row["table"] == table and row["mean"] is not None]
    base = next((row["mean"] for row in chosen if row["caption_noise"] is None), None)
    points = [
        (row["caption_noise"], row["mean"]) for row in chosen if row["caption_noise"] is not None
    ]
    clean = next((row for row in chosen if row["caption_noise"] == 0), None)
    if base is None or clean is None or abs(clean["gain"]) <= (clean["gain_interval"] or 0.0):
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 >= base > y1:
            return float(x0 + (x1 - x0) * (y0 - base) / (y0 - y1))
    return 0.0 if points[0][1] < base else None


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [row for row in rows if row["table"] == table]
        shown = sorted({name for row in chosen for name in row["languages"]})[:6]
        cells = [
            [
                *(
                    row[c]
                    for c in ("setting", "seeds", "mean", "interval", "gain", "gain_interval")
                ),
                *(row["languages"].get(name, {}).get("mean") for name in shown),
            ]
            for row in chosen
        ]
        pins = {
            "all": "all pins",
            "hidden": "pins without a title",
            "new": "pins without a title or a training pair",
        }[chosen[0]["pins"]]
        print_table(
            f"Table {table}: Recall@10, {pins}. {LABEL}",
            ["setting", "seeds", "mean", "+-", "gain", "+-", *shown],
            cells,
        )
