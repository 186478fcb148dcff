"""``omni rebuild --store URL``: pull what is active there, build beside it, push what was built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from encoders.commands.console import say, stage
from index_builder.errors import PublishError
from index_builder.releases.store import ReleaseStore
from index_builder.remote.object_store import ObjectStore, default_cache_folder
from index_builder.remote.pull import pull_release
from index_builder.remote.push import push_release
from index_builder.remote.recipe import read_current
from index_builder.remote.watch import claim_cache

KEPT_RELEASES = 2
"""In the cache of builds: what was pushed, and what it was built from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTarget:
    """A store at a URL, and the cache folder in which its next release is built.

    Attributes:
        remote: The store.
        store: In the cache; the release that was active at the URL is active here, too.
        parent: Its id; None: none was active.
    """

    remote: ObjectStore
    store: ReleaseStore
    parent: str | None

    def push(self, release_id: str, activate: bool) -> None:
        """Push what was built, and make it the active release on both sides if that is wanted.

        Raises:
            PublishError: Another release became active at the URL meanwhile.
            RemoteUnreachable: The URL does not answer; the build is kept in the cache.
        """
        with stage("push"):
            if activate and (found := active_at(self.remote)) not in (self.parent, release_id):
                raise PublishError(
                    f"{release_id} was built over {self.parent or 'an empty store'}, but {found}"
                    f" became active at {self.remote.url} meanwhile. Nothing was pushed; run it"
                    " again."
                )
            moved = push_release(self.store, release_id, self.remote, activate=activate)
            say(f"{moved.moved_bytes / 2**20:,.1f} of {moved.total_bytes / 2**20:,.1f} MiB moved")
        if activate:
            self.store.activate(release_id, verify=False)
        self.store.gc(KEPT_RELEASES)


def open_target(url: str, cache: Path | None) -> RemoteTarget:
    """Pull the release that is active at a URL into the cache folder of builds.

    Raises:
        ReleaseError: The folder is not a cache of this URL.
        RemoteUnreachable: The URL does not answer.
        ReleaseCorrupt: What is active there is damaged.
    """
    remote = ObjectStore(url)
    folder = default_cache_folder("builds", remote.url) if cache is None else cache
    claim_cache(folder, remote.url)
    store = ReleaseStore(folder)
    parent = active_at(remote)
    if parent is not None:
        with stage(f"pull {parent}"):
            pull_release(store, remote, parent)
    return RemoteTarget(remote=remote, store=store, parent=parent)


def active_at(remote: ObjectStore) -> str | None:
    """Return the id of the release that is active at a URL; None: there is none."""
    current = read_current(remote)
    return None if current is None else current.release_id
