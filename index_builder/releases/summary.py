"""What a list of releases says about each."""

from __future__ import annotations

from dataclasses import dataclass, field

from index_builder.releases.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSummary:
    """One line of ``omni release list``; of a damaged release only the error is known."""

    release_id: str
    active: bool
    created: str = ""
    space_id: str = ""
    parent: str | None = None
    entities: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    error: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, active: bool) -> ReleaseSummary:
        """Summarise a release."""
        return cls(
            release_id=manifest.release_id,
            active=active,
            created=str(manifest.measured.get("created", "")),
            space_id=manifest.space_id,
            parent=manifest.parent,
            entities={name: entity.count for name, entity in manifest.entities.items()},
            size_bytes=manifest.total_bytes(),
        )
