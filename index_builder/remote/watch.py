"""Following a URL: pull what becomes active there into a cache folder, while a server wants it.

``python -m index_builder.remote.watch`` is the process beside a server: a parent, and a child that
pulls. A child that dies is replaced; both end when standard input is closed, which a server that
dies does, however it dies.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from index_builder.errors import PublisherBusy, ReleaseCorrupt, ReleaseError
from index_builder.releases.current import CURRENT_NAME
from index_builder.releases.store import ReleaseStore
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.pull import pull_release
from index_builder.remote.recipe import read_current
from index_builder.storage.durable_files import make_folder, write_durably

STATUS_NAME = ".remote"
RESTART_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between two looks after failures, unless more lie between looks anyway."""
log = logging.getLogger("index_builder.remote.watch")  # also where this file is the program


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStatus:
    """What the last look at a URL has found; a file in the ``releases/`` of its cache.

    Attributes:
        url: Where.
        reached: When the store answered last, seconds since 1970; 0: never.
        looked: When the last look ended, or began to pull; 0: never.
        taken: The ``CURRENT`` that was taken over last, as text.
        error: Why the last look failed; empty: it did not.
    """

    url: str
    reached: float = 0.0
    looked: float = 0.0
    taken: str = ""
    error: str = ""


def read_status(cache: Path, url: str) -> RemoteStatus:
    """Read the status of the cache of ``url``; a new one if there is none."""
    status = _status_of(ReleaseStore(cache))
    return status if status is not None and status.url == url else RemoteStatus(url=url)


def _status_of(store: ReleaseStore) -> RemoteStatus | None:
    try:
        return RemoteStatus(**json.loads((store.releases / STATUS_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write_status(store: ReleaseStore, status: RemoteStatus) -> None:
    write_durably(store.releases / STATUS_NAME, json.dumps(asdict(status)).encode())


def claim_cache(cache: Path, url: str) -> None:
    """Make a folder the cache of a URL, unless it is that already.

    Raises:
        ReleaseError: It is the cache of another URL, or a store in its own right.
        NotWritable: This user may not write there.
        DiskFull: No room.
    """
    store = ReleaseStore(cache)
    status = _status_of(store)
    if status is None and (store.releases / CURRENT_NAME).exists():
        raise ReleaseError(
            f"{cache} is a store, not the cache of {url}: old releases in a cache are removed. Name"
            " another folder (--store-cache)"
        )
    if status is not None and status.url != url:
        raise ReleaseError(
            f"{cache}: expected the cache of {url}, but got that of {status.url}. Name another"
            " folder (--store-cache), or remove this one"
        )
    if status is None:
        make_folder(store.releases)
        _write_status(store, RemoteStatus(url=url))


class RemoteFollower:
    """Takes over what becomes active at a URL.

    Only a change there is taken over: a rollback here holds until another release is activated
    there. Any number of followers may share a cache; one of them looks at a time.

    Args:
        url: The store to follow.
        cache: The local one; see ``claim_cache``.
        keep: Releases that stay here, as of ``ReleaseStore.gc``.
    """

    def __init__(self, url: str, cache: Path, keep: int) -> None:
        self.store = ReleaseStore(cache)
        self._url = url
        self._keep = keep

    def look(self) -> RemoteStatus:
        """Look once; never raises for what the network, the URL or the disk does."""
        status = read_status(self.store.root, self._url)
        try:
            with self.store.lock("follow"):
                return self._look()
        except PublisherBusy:  # another server that shares the cache looks just now
            return status
        except Exception as error:
            return self._failed(status, error)

    def _look(self) -> RemoteStatus:
        before = read_status(self.store.root, self._url)
        after = before
        try:
            remote = ObjectStore(self._url)
            current = read_current(remote)
            now = time.time()
            after = replace(before, reached=now, looked=now)
            text = "" if current is None else current.to_bytes().decode()
            if before.taken and not text:
                raise ReleaseError(
                    f"{self._url}: nothing is active there any more; was it moved or emptied?"
                )
            if text and (text != before.taken or self._is_lost()):
                _write_status(self.store, after)
                self._pull(remote)
                after = replace(after, taken=text)
            after = replace(after, looked=time.time(), error="")
        except Exception as error:  # what is active here stays so
            after = self._failed(replace(after, error=before.error), error)
        _write_status(self.store, after)
        return after

    def _pull(self, remote: ObjectStore) -> None:
        moved = pull_release(self.store, remote)
        log.info(
            "pulled %s: %.1f of %.1f MiB moved",
            moved.release_id,
            moved.moved_bytes / 2**20,
            moved.total_bytes / 2**20,
        )
        self.store.gc(self._keep)

    def _is_lost(self) -> bool:
        """Return whether the release that is active here cannot be found, so that it is pulled."""
        try:
            return self.store.current() in (None, *self.store.damaged_ids())
        except ReleaseCorrupt:
            return True

    def _failed(self, before: RemoteStatus, error: Exception) -> RemoteStatus:
        """Say once why a look failed, and what is served all the same."""
        text = f"{type(error).__name__}: {error}"
        if text != before.error:
            active = None if self._is_lost() else self.store.current()
            served = "nothing is served yet" if active is None else f"{active} is served on"
            log.error("%s, from the cache %s: %s", served, self.store.root, text)
        return replace(before, looked=time.time(), error=text)


def main() -> None:
    """Follow until standard input ends: ``watch URL CACHE POLL_SECONDS KEEP``."""
    url, cache, poll_seconds, keep = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)
    parent = os.getpid()
    while True:
        child = os.fork()
        if child == 0:
            os.nice(5)
            _follow(RemoteFollower(url, Path(cache), int(keep)), float(poll_seconds), parent)
            os._exit(0)
        if _is_over_before(child):
            return
        log.error("the process that pulls has died; another starts in %.0f s", RESTART_SECONDS)
        if _is_over(RESTART_SECONDS):
            return


def _follow(follower: RemoteFollower, poll_seconds: float, parent: int) -> None:
    """Look for ever; after failures more rarely."""
    pause = poll_seconds
    while os.getppid() == parent:
        failed = bool(follower.look().error)
        time.sleep(pause)
        pause = min(2 * pause, max(LONGEST_PAUSE_SECONDS, poll_seconds)) if failed else poll_seconds


def _is_over_before(child: int) -> bool:
    """Wait for the end of standard input, then kill the child; False if that has died before."""
    while not _is_over(0.5):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            return False
    os.kill(child, signal.SIGKILL)  # a pull that is killed goes on where it stopped
    os.waitpid(child, 0)
    return True


def _is_over(seconds: float) -> bool:
    """Wait; True as soon as standard input has ended."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main()
