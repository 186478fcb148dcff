"""The release of the serving benchmarks: 100,000 real text vectors as pins, and a query tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.index.vectors import VectorSet, default_cache, load_vectors
from encoders.commands.console import stage
from encoders.exact_search import exact_top_k
from index_builder.building.build import RebuildConfig, build_release
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig

DIMENSION = 256


@dataclass(frozen=True, slots=True)
class ServingRelease:
    """A published release and what was put in.

    Attributes:
        store: Folder to give to ``omni serve``.
        space_id: Of its vectors.
        vectors: Corpus with held-out queries; the id of a corpus row is its number.
        truth: int64 ``(Q, k)``, the exact rows for ``vectors.queries``.
        build: Index kind, parameters and the measured recall, from the manifest.
    """

    store: Path
    space_id: str
    vectors: VectorSet
    truth: np.ndarray
    build: dict[str, object]


def serving_release(
    data_dir: Path,
    *,
    size: int,
    kind: str,
    k: int = 10,
    bundle: Path | None = None,
    cache: Path | None = None,
) -> ServingRelease:
    """Build the release, or take the one an earlier run left.

    Args:
        data_dir: Folder with ``large/``.
        size: Vectors in the index.
        kind: Index kind, e.g. ``symqg``.
        k: Depth of the exact answers.
        bundle: Model bundle whose query tower encodes texts; None: a tiny random tower (its answers
            to texts mean nothing, its speed is not reported; ready vectors are unaffected).
        cache: Where releases and vectors are kept.
    """
    root = cache or default_cache()
    vectors = load_vectors(data_dir, size=size, cache=root)
    tower = "random" if bundle is None else bundle.resolve().name
    folder = root / f"serve-{vectors.name}-{kind}-{tower}"
    store = ReleaseStore(folder / "store")
    bundle = bundle or folder / "bundle"
    if not (bundle / "space.json").is_file():
        from benchmarks.small_releases import write_small_bundle

        write_small_bundle(bundle, seed=1, dimension=DIMENSION)
    space_id = str(json.loads((bundle / "space.json").read_text(encoding="utf-8"))["space_id"])
    if store.current() is None:
        with stage(f"build a release of {len(vectors.corpus):,} vectors with {kind}"):
            pins = EntityInput(
                ids=[str(row) for row in range(len(vectors.corpus))],
                vectors=np.array(vectors.corpus),
                space_id=space_id,
            )
            calibration = QuerySet([""] * len(vectors.calibration), np.array(vectors.calibration))
            build_release(
                {"pin": pins},
                bundle,
                store,
                RebuildConfig(index=IndexConfig(kind=kind)),
                {"*": calibration},
            )
    manifest = store.open_current()
    entity = manifest.manifest.entities["pin"]
    build = {
        "kind": manifest.entities["pin"].kind,
        "description": manifest.entities["pin"].describe(),
        "count": entity.count,
    }
    manifest.close()
    path = root / f"truth-{vectors.name}-{k}.npy"
    if not path.is_file():
        np.save(path, exact_top_k(np.array(vectors.queries), np.array(vectors.corpus), k)[0])
    return ServingRelease(store.root, space_id, vectors, np.load(path), build)
