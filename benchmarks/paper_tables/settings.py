"""The trainings of the paper's tables and the design questions, and the result each line shows."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper_tables.data import FROZEN
from encoders.config.train_config import (
    ENTITY,
    MATRYOSHKA_WEIGHTS,
    QUERY,
    VECTOR_PREFIX,
    DatasetConfig,
)

SHARES = {"pin": 8.0, "product": 4.0, "query": 2.0, "ad": 2.0}
"""The paper's mix with ads in the place of product-offsite: parts of 16 of the whole batch."""
TYPES = ("pin", "product", "ad")
"""Entity types with a catalogue."""
TABLE_ROWS = 30_000
ONE_ROW_PER_TOKEN = 0
SMALL_PRODUCT_PAIRS = 195
"""A thousandth of the 195,245 human training pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training (or a chain of them) whose result is one file per seed."""

    key: str
    """Names the file: a letter changed here is another training."""
    kind: str = "plain"
    """``plain``, ``reference`` (nothing is trained), ``new_type``, ``versions``."""
    datasets: tuple[str, ...] = tuple(SHARES)
    towers: tuple[str, ...] = (ENTITY,)
    """Candidate towers of pins, products and ads."""
    entity_towers: str = "unified"
    table_rows: int = TABLE_ROWS
    log_q: bool = True
    matryoshka: bool = True
    product_pairs: int = 0
    """Only so many product pairs are kept; 0: all."""
    product_share: float = SHARES["product"]
    """Replace the shares of some datasets, in parts of 16; the others keep theirs.

    Other shares are another batch, so the training is another one.
    """
    whole_batch: bool = False
    """A task alone fills the batch of the whole mix, instead of its part of it."""
    gradients: bool = False
    """Measure the gradient norm of every task at the end."""

    def dataset_configs(self) -> tuple[DatasetConfig, ...]:
        """Datasets, shares and candidates."""
        shares = SHARES | {"product": self.product_share}
        return tuple(
            DatasetConfig(
                name=name,
                share=shares[name],
                candidates=(QUERY,) if name == "query" else self.towers,
            )
            for name in self.datasets
        )

    def batch_pairs(self, whole: int) -> int:
        """Return pairs per step when the four datasets at the paper's shares have ``whole``.

        A dataset alone sees what it sees in the mix, or with ``whole_batch`` as many as all.
        """
        if self.whole_batch:
            return whole
        return round(
            whole * sum(config.share for config in self.dataset_configs()) / sum(SHARES.values())
        )

    def weights(self) -> dict[int, float]:
        """Matryoshka weights."""
        return dict(MATRYOSHKA_WEIGHTS) if self.matryoshka else {}


COMPATIBLE = VECTOR_PREFIX + FROZEN
REFERENCE = Training(key="use", kind="reference")
MIX = Training(key="mix", gradients=True)
SEPARATE = Training(key="separate", entity_towers="separate")
SINGLE = {name: Training(key=f"single-{name}", datasets=(name,)) for name in SHARES}
SINGLE_WHOLE = {
    name: Training(key=f"single-whole-{name}", datasets=(name,), whole_batch=True)
    for name in SHARES
}
SEARCHSAGE = Training(key="searchsage", datasets=TYPES, towers=(COMPATIBLE,))
OMNI = Training(key="omni", towers=(ENTITY, COMPATIBLE))
ROWS = {
    10_000: Training(key="rows-10000", table_rows=10_000),
    TABLE_ROWS: MIX,
    100_000: Training(key="rows-100000", table_rows=100_000),
    ONE_ROW_PER_TOKEN: Training(key="rows-token", table_rows=ONE_ROW_PER_TOKEN),
}
VOLUME = {
    share: Training(
        key=f"volume-{share:g}",
        product_pairs=SMALL_PRODUCT_PAIRS,
        product_share=share,
        gradients=True,
    )
    for share in (0.05, 1.0, 4.0)
}
"""0.05 of 16 parts is one pair of a step of 320."""
NO_MATRYOSHKA = Training(key="no-matryoshka", matryoshka=False)
NO_LOG_Q = Training(key="no-logq", log_q=False)
NEW_TYPE = Training(key="new-type", kind="new_type", datasets=("pin", "product", "query"))
VERSIONS = Training(key="versions", kind="versions", datasets=("pin",))
PREFIXES = (16, 32, 64, 128, 256)
VERSION_NAMES = ("version 1", "version 2", "version 3", "cold retrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a table."""

    table: str
    setting: str
    training: Training
    metrics: tuple[str, ...]
    """Keys of a result's ``recall``, e.g. ``pin/entity``."""
    variant: str = ""
    """Of a result with several (``new_type``, ``versions``)."""
    baseline: str = ""
    """The setting of the same table that differences are taken from, seed by seed; empty: none."""


LEARNED, FROZEN_VECTORS = (
    tuple(f"{name}/entity" for name in TYPES),
    tuple(f"{name}/frozen" for name in TYPES),
)
EVERYTHING = (*LEARNED, "query/query")
SHARE_NAMES = {0.05: "1 pair a step", 1.0: "1/16 of the batch", 4.0: "4/16 of the batch (paper)"}
ROW_NAMES = {rows: f"{rows:,} rows" if rows else "one row per token" for rows in ROWS}

LINES: tuple[Line, ...] = (
    Line(
        table="2", setting="USE zero-shot (reference)", training=REFERENCE, metrics=FROZEN_VECTORS
    ),
    Line(
        table="2",
        setting="SearchSage: query tower on frozen vectors",
        training=SEARCHSAGE,
        metrics=FROZEN_VECTORS,
    ),
    Line(table="2", setting="OmniSearchSage: learned towers", training=OMNI, metrics=LEARNED),
    *(
        Line(
            table="5",
            setting=f"single task: {name}",
            training=one,
            metrics=(f"{name}/{'query' if name == 'query' else 'entity'}",),
        )
        for name, one in SINGLE.items()
    ),
    *(
        Line(
            table="5",
            setting=f"single task at the whole batch: {name}",
            training=one,
            metrics=(f"{name}/{'query' if name == 'query' else 'entity'}",),
        )
        for name, one in SINGLE_WHOLE.items()
    ),
    Line(table="5", setting="multi-task, unified entity tower", training=MIX, metrics=EVERYTHING),
    Line(
        table="5",
        setting="multi-task, separate entity towers",
        training=SEPARATE,
        metrics=EVERYTHING,
        baseline="multi-task, unified entity tower",
    ),
    Line(
        table="6",
        setting="SearchSage on frozen vectors",
        training=SEARCHSAGE,
        metrics=FROZEN_VECTORS,
    ),
    Line(
        table="6",
        setting="OmniSearchSage with compatibility on frozen vectors",
        training=OMNI,
        metrics=FROZEN_VECTORS,
        baseline="SearchSage on frozen vectors",
    ),
    Line(
        table="6",
        setting="OmniSearchSage without compatibility on frozen vectors",
        training=MIX,
        metrics=FROZEN_VECTORS,
    ),
    Line(
        table="6", setting="learned towers, without compatibility", training=MIX, metrics=EVERYTHING
    ),
    Line(
        table="6",
        setting="learned towers, with compatibility",
        training=OMNI,
        metrics=EVERYTHING,
        baseline="learned towers, without compatibility",
    ),
    *(
        Line(
            table="rows",
            setting=ROW_NAMES[n],
            training=one,
            metrics=EVERYTHING,
            baseline=ROW_NAMES[TABLE_ROWS] if one != MIX else "",
        )
        for n, one in ROWS.items()
    ),
    Line(
        table="volume",
        setting="all product pairs, 4/16 of the batch",
        training=MIX,
        metrics=EVERYTHING,
    ),
    *(
        Line(
            table="volume",
            setting=f"{SMALL_PRODUCT_PAIRS} product pairs, {SHARE_NAMES[s]}",
            training=one,
            metrics=EVERYTHING,
        )
        for s, one in VOLUME.items()
    ),
    Line(
        table="new-type",
        setting="before: never trained on ads",
        training=NEW_TYPE,
        variant="before",
        metrics=EVERYTHING,
    ),
    *(
        Line(
            table="new-type",
            setting=name,
            training=NEW_TYPE,
            variant=variant,
            metrics=EVERYTHING,
            baseline="before: never trained on ads",
        )
        for variant, name in (
            ("ads only", "goes on with ads only"),
            ("with others", "goes on with all at their shares"),
            ("own tower", "ad tower of its own, query tower frozen"),
        )
    ),
    Line(table="new-type", setting="all from the start", training=MIX, metrics=EVERYTHING),
    *(
        Line(
            table="versions",
            setting=f"query tower for version {version}",
            training=VERSIONS,
            variant=f"version {version}",
            metrics=tuple(f"pin/{name}" for name in VERSION_NAMES),
        )
        for version in (1, 2, 3)
    ),
    *(
        Line(
            table="prefixes",
            setting=name,
            training=one,
            metrics=tuple(f"pin/entity/{n}" for n in PREFIXES),
        )
        for name, one in (("trained on prefixes", MIX), ("trained on 256 only", NO_MATRYOSHKA))
    ),
    *(
        Line(
            table="logq",
            setting=name,
            training=one,
            metrics=tuple(
                f"{t}/entity/{part}"
                for t in ("pin", "product")
                for part in ("head", "torso", "tail")
            ),
            baseline="logQ on" if one == NO_LOG_Q else "",
        )
        for name, one in (("logQ on", MIX), ("logQ off", NO_LOG_Q))
    ),
)
TABLES = tuple(dict.fromkeys(line.table for line in LINES))
