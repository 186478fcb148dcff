"""How one entity type is indexed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from encoders.errors import ConfigError
from index_builder.ann import AnnConfig
from index_builder.ann.choice import check_kind
from index_builder.ann.old_kinds import current_kind

DEFAULT_RECALL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """How one entity type is indexed."""

    kind: str = "auto"
    """``auto``, hnsw, symqg, int8-graph, exact or faiss; ``swift`` and ``lean`` are still read."""
    ann: AnnConfig = field(default_factory=AnnConfig)
    """Parameters of the graph."""
    low_memory: bool = False
    """Whether ``auto`` prefers little memory (at most 0.6 kB private a vector) over speed."""
    deterministic: bool = False
    """The same input and seed give the same bytes; builds on one thread."""
    default_recall: float = DEFAULT_RECALL
    """ANN recall@10 that searches aim at when they do not say."""
    reuse: Path | None = field(default=None, repr=False, compare=False)
    """Folder of an earlier index whose graph is carried over where little changed; None: built."""

    def __post_init__(self) -> None:
        check_kind(self.kind)
        kind, ann = current_kind(self.kind, self.ann)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "ann", ann)
        if not 0.5 <= self.default_recall < 1.0:
            raise ConfigError(
                f"default_recall must be at least 0.5 and below 1, but got {self.default_recall}."
            )
        if self.deterministic and self.ann.threads != 1:
            raise ConfigError(
                f"a deterministic build uses one thread, but got threads={self.ann.threads}. Set"
                " threads to 1 or build in fast mode."
            )
        if self.deterministic and self.kind == "symqg":
            raise ConfigError(
                "index kind 'symqg' draws a random rotation that cannot be seeded. Use auto, hnsw"
                " or int8-graph for a deterministic build."
            )
