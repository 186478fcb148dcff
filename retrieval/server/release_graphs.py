"""Graphs of releases in a process that forks: loaded once, shared by all its workers."""

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
"""By entity type."""


class ReleaseGraphs:
    """Holds the graphs of the last few releases. Loading starts no threads.

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
        """Have the graphs of a release in memory; one that cannot be loaded leaves nothing.

        Args:
            release_id: Which.
            verify: Called with it first, unless its graphs are in memory; raises if it must not be
                served.
        """
        if release_id not in self.by_release:
            verify(release_id)
            path = self._store.path_of(release_id)
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

    def discard(self, release_id: str) -> None:
        """Drop the graphs of a release that is not served after all."""
        self.by_release.pop(release_id, None)

    def trim(self) -> None:
        """Drop the graphs of the oldest releases beyond ``keep_releases``."""
        while len(self.by_release) > self._config.keep_releases:
            self.by_release.popitem(last=False)
