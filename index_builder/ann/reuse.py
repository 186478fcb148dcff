"""Carry the graph of an earlier index over to a changed corpus: little is built, most is kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index_builder.ann.graph_files import read_symqg_links
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.interface import AnnConfig
from index_builder.errors import IndexFormatError, UnsupportedLibrary
from index_builder.native import carry_graph
from index_builder.storage.corpus import GONE, node_now
from index_builder.storage.engine_arrays import EngineArrays, central_node

MAX_CHANGED = 0.2
"""Share of the vectors that may change until the next full build, all rebuilds since together.

Carried links are a little worse than built ones. Calibration measures what they reach, and this
bounds by how much searches may slow down.
"""
_DECIDING = ("m", "degree", "ef_construction", "bits", "sketched_links")
"""Parameters that decide which links are built."""


class NotReusable(Exception):
    """Why an earlier graph cannot be carried over, as a clause for reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """How much of an earlier graph was carried over.

    Attributes:
        kept: Vectors that stayed.
        inserted: Vectors that are new, or were changed.
        removed: Vectors that are gone, or were changed.
        reinserted: Vectors that stayed and were inserted again, since nothing led to them any more.
        changed_since_full: Share of the vectors that changed since the last full build.
    """

    kept: int
    inserted: int
    removed: int
    reinserted: int
    changed_since_full: float

    def __str__(self) -> str:
        return (
            f"links of {self.kept:,} of {self.kept + self.inserted:,} vectors carried over,"
            f" {self.inserted:,} inserted, {self.removed:,} removed"
            f" ({self.changed_since_full:.1%} changed since the last full build)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return JSON for the manifest."""
        return asdict(self)


class EarlierIndex(NamedTuple):
    """An index of an earlier release, as far as its graph is concerned."""

    folder: Path
    kind: str
    parameters: dict[str, Any]
    vectors: np.ndarray
    """float32 ``(U, D)``, distinct."""
    changed_since_full: float
    """Share of its vectors that changed since its graph was built in full."""


def carried_over(
    earlier: EarlierIndex, vectors: np.ndarray, config: AnnConfig
) -> tuple[Int8GraphIndex, Reuse]:
    """Build a compiled walk over the graph of an earlier index, changed as the corpus was.

    Args:
        earlier: Of kind ``int8-graph`` or ``symqg``.
        vectors: float32 ``(U', D)``, distinct, the changed corpus.
        config: Parameters that a full build would have.

    Raises:
        NotReusable: The earlier index cannot serve, or too much changed.
    """
    if carry_graph is None:
        raise NotReusable("the compiled extension was not built")
    if earlier.vectors.shape[1] != vectors.shape[1]:
        raise NotReusable("the vectors have another width")
    wanted = asdict(config)
    for name in _DECIDING:
        if name == "sketched_links" and earlier.kind != "int8-graph":
            continue
        if earlier.parameters.get(name) != wanted[name]:
            raise NotReusable(f"{name} is {wanted[name]} and was {earlier.parameters.get(name)}")
    now = node_now(earlier.vectors, vectors)
    kept = int(np.count_nonzero(now != GONE))
    removed, inserted = len(now) - kept, len(vectors) - kept
    changed = earlier.changed_since_full + max(removed, inserted) / max(len(vectors), 1)
    if changed > MAX_CHANGED:
        raise NotReusable(
            f"{changed:.1%} of the vectors changed since the last full build, more than"
            f" {MAX_CHANGED:.0%}"
        )
    arrays, links = _earlier_arrays(earlier)
    graph = np.empty((len(vectors), links.shape[1]), dtype=np.uint32)
    sample = np.sort(now[now != GONE])[:: max(1, kept // 2_000)]
    entry = int(sample[central_node(vectors[sample])])
    try:
        reinserted = carry_graph(
            vectors, vectors.shape[1], links, now, entry, config.ef_construction, graph
        )
    except ValueError as error:
        raise NotReusable(f"the earlier graph is damaged ({error})") from error
    if arrays is None or (arrays.links is None) == config.sketched_links:
        index = Int8GraphIndex.over(vectors, graph, config)
    else:
        index = Int8GraphIndex(vectors, arrays.carried(vectors, graph, now), config)
    return index, Reuse(
        kept=kept,
        inserted=inserted,
        removed=removed,
        reinserted=reinserted,
        changed_since_full=round(changed, 6),
    )


def _earlier_arrays(earlier: EarlierIndex) -> tuple[EngineArrays | None, np.ndarray]:
    """Return the arrays beside an earlier graph, where it has any, and its links.

    Raises:
        NotReusable: It shows no links, or its files cannot be read.
    """
    try:
        if earlier.kind == "int8-graph":
            arrays = EngineArrays.mapped(earlier.folder, earlier.vectors)
            links = arrays.neighbours()
            if links is None:
                raise NotReusable("the earlier index has no links")
            return arrays, np.ascontiguousarray(links)
        if earlier.kind == "symqg" and earlier.parameters.get("bits") == 0:
            path = earlier.folder / "index.symqg"
            degree = int(earlier.parameters["degree"])
            return None, np.ascontiguousarray(read_symqg_links(path, earlier.vectors, degree))
    except (OSError, ValueError, IndexFormatError, UnsupportedLibrary) as error:
        raise NotReusable(f"the earlier index cannot be read ({error})") from error
    raise NotReusable(f"links of kind {earlier.kind} are not read from a release")
