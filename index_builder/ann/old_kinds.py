"""Names of index kinds that manifests and commands of earlier versions hold."""

from __future__ import annotations

from dataclasses import replace

from index_builder.ann.interface import AnnConfig

RENAMED_KINDS = {"swift": True, "lean": False}
"""Name of an earlier version -> ``sketched_links`` of today's ``int8-graph``."""
RETIRED_KINDS = {
    "rabitq": "--index int8-graph --no-sketched-links, which needs less memory and finds more",
    "faiss-ivf": "--index faiss, or --index int8-graph --no-sketched-links for least memory",
}
"""Kind that can be neither built nor read -> the flags of ``omni rebuild`` to use instead."""


def current_kind(kind: str, config: AnnConfig) -> tuple[str, AnnConfig]:
    """Translate a kind that was renamed; any other name comes back as it is."""
    if kind not in RENAMED_KINDS:
        return kind, config
    return "int8-graph", replace(config, sketched_links=RENAMED_KINDS[kind])
