"""The store of releases: stage, publish, activate, roll back, collect.

Each step is all or nothing, whenever the process dies.

Layout of ``<store>/releases/``: one folder per release; ``CURRENT`` (JSON: the active release, the
SHA-256 of its manifest, and the releases active before it), replaced by one rename; ``.locks/``
(flocks: ``publish``, ``build``, one per open release; who may not write there locks the manifest of
the release it opens); ``.staging-*`` (unfinished builds, resumable); ``.trash-*`` (releases being
removed).

Releases are counted as they are published, and that is their order: clocks decide nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from index_builder.ann import AnnIndex
from index_builder.errors import (
    NotWritable,
    PublisherBusy,
    PublishError,
    ReleaseCorrupt,
    ReleaseError,
    ReleaseNotFound,
)
from index_builder.releases.collection import (
    empty_trash,
    remove_folded_log,
    remove_leftovers,
    remove_release,
)
from index_builder.releases.current import (
    CURRENT_NAME,
    HISTORY_LENGTH,
    Current,
    check_release_id,
    is_release_id,
)
from index_builder.releases.manifest import MANIFEST_NAME, PUBLISH_NUMBER, Manifest, publish_number
from index_builder.releases.release import Release, read_manifest
from index_builder.releases.summary import ReleaseSummary
from index_builder.releases.verification import check_contents, check_cpu, check_names_and_sizes
from index_builder.storage.durable_files import (
    FileLock,
    disk_full_is_clear,
    fsync_folder,
    fsync_tree,
    make_folder,
    require_writable,
    write_durably,
)

log = logging.getLogger(__name__)

__all__ = ["CURRENT_NAME", "ReleaseStore", "ReleaseSummary"]


def _place(path: Path) -> tuple[int, str, int, str]:
    """Return the sort key of a release folder: its number.

    Releases of earlier versions have none: they come first, by when they were built or written.
    """
    written = (path / MANIFEST_NAME).stat().st_mtime_ns
    created, number = "", 0
    with suppress(ReleaseError):
        manifest = read_manifest(path)
        created = str(manifest.measured.get("created", ""))
        number = publish_number(manifest)
    if not created:
        created = datetime.fromtimestamp(written / 1e9, UTC).isoformat(timespec="milliseconds")
    return number, created, written, path.name


class ReleaseStore:
    """The folder ``root`` with ``releases/`` and ``live/`` inside.

    Any number of processes may use one store at the same time.
    """

    def __init__(self, root: Path | str) -> None:
        root = Path(root)
        # Naming the inner folder means the same store
        self.root = root.parent if root.name == "releases" else root
        self.releases = self.root / "releases"
        self.live_root = self.root / "live"
        self._locks = self.releases / ".locks"

    # --- reading ----------------------------------------------------------------------------------

    def path_of(self, release_id: str) -> Path:
        """Return the folder of a release, whether it exists or not."""
        return self.releases / check_release_id(release_id)

    def current_record(self) -> Current | None:
        """Read what is active; None when nothing was ever activated.

        Raises:
            ReleaseCorrupt: ``CURRENT`` was damaged.
        """
        try:
            content = (self.releases / CURRENT_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Current.from_bytes(content, str(self.releases))

    def current(self) -> str | None:
        """Return the id of the active release, or None; cheap enough for several calls a second."""
        record = self.current_record()
        return record.release_id if record else None

    def open(
        self, release_id: str, *, verify: bool = True, graphs: Mapping[str, AnnIndex] | None = None
    ) -> Release:
        """Open a release; while it is open, ``gc`` in any process leaves it alone.

        Raises as ``Release.open`` does.
        """
        return self._open(release_id, None, verify, graphs)

    def open_current(self, *, verify: bool = True) -> Release:
        """Open the active release.

        Raises:
            ReleaseNotFound: Nothing is active.
            ReleaseCorrupt: It differs from what was activated. Otherwise raises as ``Release.open``
                does.
        """
        record = self.current_record()
        if record is None:
            raise ReleaseNotFound(
                f"no release is active in {self.root}: publish one with `omni rebuild`, or choose"
                " one with `omni release activate`"
            )
        return self._open(record.release_id, record.manifest_sha256, verify)

    def _open(
        self,
        release_id: str,
        expected_sha256: str | None,
        verify: bool,
        graphs: Mapping[str, AnnIndex] | None = None,
    ) -> Release:
        path = self.path_of(release_id)
        lease = self._leased(release_id) if path.is_dir() else None
        try:
            return Release.open(
                path, verify=verify, expected_sha256=expected_sha256, lease=lease, graphs=graphs
            )
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    def _leased(self, release_id: str) -> FileLock | None:
        """Take the lock that keeps ``gc`` away from a release.

        None if it has no manifest, or if neither lock can be taken: this is logged, since ``gc``
        may then remove the release while it is open.

        Raises:
            PublisherBusy: It is being removed.
        """
        refused: NotWritable | FileNotFoundError | None = None
        for lease in self._leases(release_id):
            try:
                if lease.acquire(shared=True, timeout_seconds=5.0):
                    return lease
            except (NotWritable, FileNotFoundError) as error:
                refused = error
                continue
            raise PublisherBusy(
                f"release {release_id} is being removed by another process; choose another one"
            )
        if isinstance(refused, NotWritable):
            log.warning(
                f"{release_id} is open without a lock, so that `omni release gc` may remove it:"
                f" {refused}"
            )
        return None

    def _leases(self, release_id: str) -> tuple[FileLock, FileLock]:
        """Return the locks of an open release: who may not create the first takes the second."""
        with suppress(NotWritable):
            make_folder(self._locks)
        manifest = self.path_of(release_id) / MANIFEST_NAME
        return FileLock(self._locks / f"open-{release_id}.lock"), FileLock(manifest, create=False)

    @contextmanager
    def held(self, release_id: str) -> Iterator[Path]:
        """Keep ``gc`` away from a release that is read without being opened; gives its folder.

        Raises:
            PublisherBusy: It is being removed.
        """
        path = self.path_of(release_id)
        lease = self._leased(release_id) if path.is_dir() else None
        try:
            yield path
        finally:
            if lease is not None:
                lease.release()

    def ids(self) -> list[str]:
        """Return the ids of all published releases, in the order in which they were published."""
        if not self.releases.is_dir():
            return []
        folders = [
            p
            for p in self.releases.iterdir()
            if not p.name.startswith(".") and (p / MANIFEST_NAME).is_file()
        ]
        return [p.name for p in sorted(folders, key=_place)]

    def damaged_ids(self) -> list[str]:
        """Return ids that ``ids`` does not see, by name.

        They are folders that lost their manifest, and an active release that is gone.
        """
        folders = self.releases.iterdir() if self.releases.is_dir() else ()
        found = {
            p.name
            for p in folders
            if is_release_id(p.name) and not (p / MANIFEST_NAME).is_file() and p.is_dir()
        }
        active = self._readable_current()
        if active is not None and not (self.path_of(active) / MANIFEST_NAME).is_file():
            found.add(active)
        return sorted(found)

    def earlier(self) -> list[str]:
        """Return the releases that were active before the current one and still exist.

        The most recent comes first; ``rollback`` goes to it. Whoever asks what a rollback does,
        asks this.

        Raises:
            ReleaseCorrupt: ``CURRENT`` was damaged.
        """
        record = self.current_record()
        history = record.history if record else ()
        return [h for h in history if (self.path_of(h) / MANIFEST_NAME).is_file()]

    def _readable_current(self) -> str | None:
        try:
            return self.current()
        except ReleaseCorrupt:
            return None

    def _manifest(self, release_id: str) -> Manifest:
        path = self.path_of(release_id)
        if path.is_dir() and not (path / MANIFEST_NAME).exists():
            raise ReleaseCorrupt(
                f"{path}: {MANIFEST_NAME} is missing. Restore it from a copy, or remove the folder"
            )
        return read_manifest(path)

    def list(self) -> list[ReleaseSummary]:
        """Summarise all releases, oldest first; those of ``damaged_ids`` come last."""
        active = self._readable_current()
        names = (*self.ids(), *self.damaged_ids())
        return [self._summary(name, active=name == active) for name in names]

    def _summary(self, release_id: str, active: bool) -> ReleaseSummary:
        try:
            return ReleaseSummary.of(self._manifest(release_id), active)
        except ReleaseError as error:
            return ReleaseSummary(release_id=release_id, active=active, error=str(error))

    def verify(self, release_id: str) -> Manifest:
        """Check one release to the last byte without loading it.

        Raises as ``Release.open`` does.
        """
        path = self.path_of(release_id)
        manifest = self._manifest(release_id)
        check_cpu(manifest)
        check_names_and_sizes(path, manifest)
        check_contents(path, manifest)
        return manifest

    # --- writing ----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, name: str, wait_seconds: float = 0.0) -> Iterator[FileLock]:
        """Hold one of the store's locks (``build`` or ``publish``).

        Raises:
            PublisherBusy: Another process kept it for ``wait_seconds``.
        """
        make_folder(self._locks)
        lock = FileLock(self._locks / f"{name}.lock")
        if not lock.acquire(timeout_seconds=wait_seconds):
            raise PublisherBusy(
                f"process {lock.holder()} is publishing into {self.root}; wait for it (or pass a"
                " longer --wait), nothing was changed"
            )
        try:
            yield lock
        finally:
            lock.release()

    def staging(self, key: str) -> Path:
        """Return the folder of an unfinished build; the same ``key`` finds what was left of one.

        The caller holds the ``build`` lock.
        """
        folder = self.releases / f".staging-{key}"
        make_folder(folder)
        return folder

    def publish(
        self,
        staging: Path,
        manifest: Manifest,
        *,
        activate: bool = True,
        require_parent: bool = False,
    ) -> str:
        """Move a complete staging folder into place under its release id.

        Everything is made durable first; one rename makes it visible; one rename of ``CURRENT``
        makes it active. Publishing content that is already there under the same id is a no-op.

        Args:
            staging: Inside ``releases/``; holds exactly the files of the manifest.
            manifest: Describes them.
            activate: Make it the active release.
            require_parent: Refuse if the active release is no longer ``manifest.parent`` (partial
                rebuilds took indexes over from it).

        Returns:
            The release id.

        Raises:
            PublisherBusy: The id is taken by other content, or another process is publishing.
            PublishError: The parent changed while building.
            DiskFull: No room.
        """
        with self.lock("publish", wait_seconds=60.0):
            active = self.current()
            if require_parent and active != manifest.parent:
                raise PublishError(
                    f"this partial rebuild took indexes over from {manifest.parent}, but {active}"
                    " became active meanwhile. Nothing was published; run it again."
                )
            if not self._is_published(staging, manifest):
                self._move_into_place(staging, manifest, self._numbered(manifest).to_bytes())
            if activate:
                self._set_current(manifest.release_id)
        return manifest.release_id

    def adopt(self, staging: Path, content: bytes, *, activate: bool = True) -> str:
        """Publish a release of another store: its manifest stays as it is there, to the byte.

        Args:
            staging: Inside ``releases/``; holds exactly the files of the manifest.
            content: The bytes of that manifest.
            activate: Make it the active release.

        Returns:
            The release id.

        Raises as ``publish`` does, but for the parent.
        """
        manifest = Manifest.from_bytes(content, staging.name)
        with self.lock("publish", wait_seconds=60.0):
            if not self._is_published(staging, manifest):
                self._move_into_place(staging, manifest, content)
            if activate:
                self._set_current(manifest.release_id)
        return manifest.release_id

    def _is_published(self, staging: Path, manifest: Manifest) -> bool:
        """Return whether this very content is there already; then the staging folder goes.

        Raises:
            PublisherBusy: The id is taken by other content.
        """
        target = self.path_of(manifest.release_id)
        if not target.exists():
            return False
        if read_manifest(target).files != manifest.files:
            raise PublisherBusy(
                f"a release {manifest.release_id!r} with other content exists already; choose"
                " another --release-id"
            )
        shutil.rmtree(staging)
        return True

    def _move_into_place(self, staging: Path, manifest: Manifest, content: bytes) -> None:
        """Make a staging folder durable and visible; the ``publish`` lock is held."""
        check_names_and_sizes(staging, manifest)
        with disk_full_is_clear("publishing the release", self.releases):
            write_durably(staging / MANIFEST_NAME, content)
            fsync_tree(staging)
            os.rename(staging, self.path_of(manifest.release_id))
            fsync_folder(self.releases)

    def _numbered(self, manifest: Manifest) -> Manifest:
        """Return a manifest with the next number; the ``publish`` lock is held."""
        ids = self.ids()
        last = _place(self.path_of(ids[-1]))[0] if ids else 0
        return replace(manifest, measured={**manifest.measured, PUBLISH_NUMBER: last + 1})

    def activate(self, release_id: str, *, verify: bool = True) -> str | None:
        """Make a published release the active one.

        Args:
            release_id: Which.
            verify: Check every byte first.

        Returns:
            Id of the release that was active before, or None.

        Raises:
            ReleaseNotFound: No such release. Otherwise raises as ``verify`` does; then what was
                active stays active.
        """
        with self.lock("publish", wait_seconds=60.0):
            if verify:
                self.verify(release_id)
            else:
                read_manifest(self.path_of(release_id))
            return self._set_current(release_id)

    def rollback_target(self) -> str:
        """Return the release that ``rollback`` goes to.

        Raises:
            ReleaseNotFound: There is nothing to go back to, or it was collected.
            ReleaseCorrupt: ``CURRENT`` was damaged.
        """
        history = self.earlier()
        if not history:
            raise ReleaseNotFound(
                "there is no earlier release to roll back to: only one was ever active, or the"
                " earlier ones were collected"
            )
        return history[0]

    def rollback(self, *, to: str | None = None, verify: bool = True) -> str:
        """Go back to the release that was active before; calling it again goes further back.

        Args:
            to: What ``rollback_target`` returned, for who has loaded that release already.
            verify: Check every byte first.

        Returns:
            Id of the release that is active now.

        Raises:
            ReleaseNotFound: There is nothing to go back to, or it was collected.
            PublishError: It is no longer ``to``; nothing was changed.
        """
        with self.lock("publish", wait_seconds=60.0):
            target = self.rollback_target()
            if to not in (None, target):
                raise PublishError(
                    f"a rollback went to {to}, but another process has changed CURRENT: it would go"
                    f" to {target} now. Nothing was changed; run it again."
                )
            history = self.earlier()
            if verify:
                self.verify(target)
            self._write_current(target, tuple(history[1:]))
            return target

    def _set_current(self, release_id: str) -> str | None:
        record = None
        with suppress(ReleaseCorrupt):  # naming a release again repairs a damaged CURRENT
            record = self.current_record()
        if record is None:
            self._write_current(release_id, self._parents(release_id))
            return None
        if record.release_id == release_id:
            self._write_current(release_id, record.history)
            return release_id
        earlier = dict.fromkeys((record.release_id, *record.history))
        earlier.pop(release_id, None)
        self._write_current(release_id, tuple(earlier)[:HISTORY_LENGTH])
        return record.release_id

    def _parents(self, release_id: str) -> tuple[str, ...]:
        """Return what manifests know of a history: the parents of a release that still exist."""
        found: dict[str, None] = {release_id: None}
        with suppress(ReleaseError):
            while len(found) <= HISTORY_LENGTH:
                parent = read_manifest(self.path_of(next(reversed(found)))).parent
                if parent is None or parent in found:
                    break
                found[parent] = None
        return tuple(found)[1:]

    def _write_current(self, release_id: str, history: tuple[str, ...]) -> None:
        manifest = (self.path_of(release_id) / MANIFEST_NAME).read_bytes()
        current = Current(
            release_id=release_id,
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            activated=datetime.now(UTC).isoformat(timespec="milliseconds"),
            history=history,
        )
        write_durably(self.releases / CURRENT_NAME, current.to_bytes())

    def gc(
        self, keep: int = 3, *, dry_run: bool = False, drop_folded_log: bool = False
    ) -> Sequence[str]:
        """Remove old releases, unfinished builds and half-removed folders.

        Kept are the active release, the one ``rollback`` goes to, the newest ``keep``, every
        release that some process has open, and folders without a manifest, which may be releases
        that someone is copying in.

        Args:
            keep: How many of the newest releases stay, at least 1.
            dry_run: Only say what would go.
            drop_folded_log: Also remove live-log files whose entries every kept release already
                contains. Do so only when rebuilds start from the active release or from sources
                that hold those changes too.

        What cannot be removed is logged and left; everything else goes.

        Returns:
            Ids of removed releases.

        Raises:
            ReleaseError: ``keep`` is below 1.
            PublisherBusy: Another process is publishing.
            NotWritable: This user may not write to the store.
        """
        if keep < 1:
            raise ReleaseError(f"gc keeps at least 1 release, but keep is {keep}")
        with self.lock("publish", wait_seconds=10.0):
            if not dry_run:
                require_writable(self.releases)
                # First: a release may have the id of one that a killed gc had moved away
                empty_trash(self.releases)
            ids = self.ids()
            stay = self._kept(ids, keep)
            unwanted = [release_id for release_id in ids if release_id not in stay]
            removed = [
                release_id
                for release_id in unwanted
                if remove_release(self.releases, release_id, self._leases(release_id), dry_run)
            ]
            if not dry_run:
                remove_leftovers(self.releases, FileLock(self._locks / "build.lock"))
                if drop_folded_log:
                    remove_folded_log(self.live_root, [self.path_of(name) for name in self.ids()])
        return removed

    def _kept(self, ids: Sequence[str], keep: int) -> set[str]:
        """Return the newest releases, the active one, and the one ``rollback`` goes to."""
        stay = set(ids[-keep:])
        active = self.current()
        if active is not None:
            stay.update((active, *self.earlier()[:1]))
        return stay
