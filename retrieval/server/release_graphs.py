"""Graphs of releases in a process that forks: large ones are loaded once and shared."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable

from index_builder.ann import AnnIndex
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex
from retrieval.config import ServeConfig
from retrieval.encoding.query_encoder import choose_form, torch_installed

Graphs = dict[str, AnnIndex]
"""By entity type; empty: verified, and small enough that every worker loads its own."""


class ReleaseGraphs:
    """Holds the large graphs of the last few releases. Loading starts no threads.

    Args:
        store: Where the releases are.
        config: Form of the query tower; how many releases to hold.

    Attributes:
        by_release: Release id -> its graphs, the last loaded last.
    """

    def __init__(self, store: ReleaseStore, config: ServeConfig) -> None:
        self._store = store
        self._config = config
        self.by_release: OrderedDict[str, Graphs] = OrderedDict()

    def load(self, release_id: str, verify: Callable[[str], object]) -> None:
        """Verify a release, and have its graphs in memory unless workers load their own.

        One that cannot be loaded leaves nothing.

        Args:
            release_id: Which.
            verify: Called with it first, unless its graphs are in memory; raises if it must not be
                served.
        """
        if release_id not in self.by_release:
            verify(release_id)
            path = self._store.path_of(release_id)
            graphs: Graphs = {}
            if not self.is_in_place(release_id):
                graphs = {
                    entity_type: EntityIndex.load_graph(path / entity_type)
                    for entity_type in read_manifest(path).entities
                }
            form = choose_form(
                "cpu",
                self._config.encoder_form,
                path / "forms",
                has_gpu=False,
                has_torch=torch_installed(),
            )
            if form == "torch-fp32":
                # Once here instead of seconds in every worker; importing starts no threads
                importlib.import_module("encoders.towers.query_tower")
            self.by_release[release_id] = graphs
        self.by_release.move_to_end(release_id)

    def is_in_place(self, release_id: str) -> bool:
        """Ask whether the graphs of a release are so small that each worker loads its own."""
        path, most = self._store.path_of(release_id), self._config.in_place_bytes
        files = (
            file for name in read_manifest(path).entities for file in (path / name).glob("index.*")
        )
        return most > 0 and sum(file.stat().st_size for file in files) <= most

    def are_shared(self) -> bool:
        """Ask whether any graphs are in memory, which workers forked from here then share."""
        return any(self.by_release.values())

    def discard(self, release_id: str) -> None:
        """Drop the graphs of a release that is not served after all."""
        self.by_release.pop(release_id, None)

    def trim(self) -> None:
        """Drop the graphs of the oldest releases beyond ``keep_releases``."""
        while len(self.by_release) > self._config.keep_releases:
            self.by_release.popitem(last=False)
