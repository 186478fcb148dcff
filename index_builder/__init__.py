"""Vectors to releases: indexes, filters, calibration, the release format and the live log.

``from index_builder import ReleaseStore`` opens a store of releases. The name is looked up when it
is first used, so that ``import index_builder`` loads no index library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index_builder.releases.store import ReleaseStore

__all__ = ["ReleaseStore"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from encoders.extras import extra_named

    with extra_named(f"index_builder.{name}"):
        from index_builder.releases import store

    return getattr(store, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
