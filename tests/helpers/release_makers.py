"""Small stores for tests: a bundle-shaped folder and random unit vectors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from index_builder.ann import AnnConfig
from index_builder.building.inputs import EntityInput
from index_builder.building.plan import RebuildConfig
from index_builder.search.entity_index import IndexConfig

D = 64
SPACE = "5a" * 32


def unit_vectors(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, D), dtype=np.float32)
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def make_bundle(folder: Path, space: str = SPACE) -> Path:
    (folder / "query_encoder").mkdir(parents=True)
    (folder / "query_encoder" / "weights.bin").write_bytes(b"weights of " + space.encode())
    (folder / "entity_encoder").mkdir()
    (folder / "entity_encoder" / "weights.bin").write_bytes(b"entity weights")
    (folder / "space.json").write_text(json.dumps({"space_id": space, "dimension": D}))
    return folder


def make_input(
    name: str, count: int = 300, seed: int = 0, space: str = SPACE, **changes: Any
) -> EntityInput:
    attributes = pl.DataFrame(
        {"number": np.arange(count), "colour": [("red", "blue")[i % 2] for i in range(count)]}
    )
    values = {
        "ids": [f"{name}-{i}" for i in range(count)],
        "vectors": unit_vectors(count, seed),
        "space_id": space,
        "attributes": attributes,
    }
    return EntityInput(**{**values, **changes})


def quick(kind: str = "hnsw", **changes: Any) -> RebuildConfig:
    index = IndexConfig(kind=kind, ann=AnnConfig(m=8, ef_construction=60))
    return replace(
        RebuildConfig(index=index, min_recall=0.5, calibration_queries=40, golden_queries=8),
        **changes,
    )
