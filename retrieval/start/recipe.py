"""Write the training config that fits a catalogue's pairs: shares, time, or no training at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from retrieval.start.tables import Prepared

FEWEST_PAIRS = 2_000
"""Train pairs below which towers learn entities by heart, and the shipped tower alone finds more.

A judgement between the sample (217,198 pairs: trained towers far ahead) and few_pairs.md, not a
measurement on many catalogues.
"""
USUAL_WEIGHTS = "1,0.5"
"""Of vectors and words where no pairs fit them: a judgement, not a measurement."""
_SMALLEST_SHARE = 1
_SHARES = 16

_ZERO_SHOT = """\
# The shipped query tower on both sides: one step that changes nothing, then weight 0 for all that
# was trained. Train in earnest once there are some thousand pairs.
steps = 1
precision = "fp32"
checkpoint_every = 0
"""
_TRAINED = """\
epochs = 6.0
max_seconds = {seconds}
precision = "bf16"
log_every = 50
"""
_COMMON = """
[data]
catalogue = ["data/catalogue.parquet"]
pairs = ["data/{pairs}"]

[model]
query_encoder = "tiny-multilingual"

[features]
text_embedding = "tiny-multilingual"
full_text_weight = 2.0

[entity_tower]
table_rows = 30000
hidden = [512]

[batch]
pairs = {batch}
cross_fit = {cross_fit}
query_chunk = 512

[optimiser]
learning_rate = 2e-3
query_learning_rate = 5e-4
token_embedding_learning_rate = 3e-4
warmup_steps = 50

[validation]
fraction = {fraction}
residual_weights = {residual}
query_interpolation = {interpolation}
"""
_DATASET = """
[[datasets]]
name = "{name}"
share = {share}
"""


def write_config(path: Path, prepared: Prepared, seconds: int, *, zero_shot: bool) -> None:
    """Write a TOML config beside ``data/``."""
    head = _ZERO_SHOT if zero_shot else _TRAINED.format(seconds=seconds)
    total = sum(prepared.train_pairs.values())
    common = _COMMON.format(
        pairs=prepared.pairs.name if prepared.pairs else "pairs",
        batch=max(16, min(1024, 2 ** int(math.log2(max(total, 1) / 2 + 1)))),
        cross_fit=4 if prepared.has_engaged_queries and not zero_shot else 0,
        fraction=0.1 if total < 50_000 else 0.03,
        residual=json.dumps([0] if zero_shot else [0, 0.25, 0.5, 0.75, 1]),
        interpolation=json.dumps([0] if zero_shot else [0, 0.5, 0.75, 1]),
    )
    datasets = "".join(
        _DATASET.format(name=name, share=share)
        for name, share in shares(prepared.train_pairs).items()
    )
    path.write_text(head + common + datasets, encoding="utf-8")


def shares(pairs: Mapping[str, int]) -> dict[str, int]:
    """Divide a batch among entity types by the roots of their pairs: small ones get some, too."""
    roots = {name: math.sqrt(count) for name, count in pairs.items() if count}
    whole = sum(roots.values())
    return {
        name: max(_SMALLEST_SHARE, round(_SHARES * root / whole)) for name, root in roots.items()
    }
