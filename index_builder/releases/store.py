"""The store of releases: stage, publish, activate, roll back, collect.

Each step is all or nothing, whenever the process dies.

Layout of ``<store>/releases/``: one folder per release; ``CURRENT`` (JSON: the active release, the
SHA-256 of its manifest, and the releases active before it), replaced by one rename; ``.locks/``
(flocks: ``publish``, ``build``, one per open release); ``.staging-*`` (unfinished builds,
resumable); ``.trash-*`` (releases being removed).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from index_builder.ann import AnnIndex
from index_builder.errors import (
    PublisherBusy,
    PublishError,
    ReleaseCorrupt,
    ReleaseError,
    ReleaseNotFound,
)
from index_builder.live_log.maintenance import collect_files
from index_builder.releases.manifest import MANIFEST_NAME, Manifest
from index_builder.releases.release import Release, read_manifest
from index_builder.releases.verification import check_contents, check_cpu, check_names_and_sizes
from index_builder.storage.durable_files import (
    FileLock,
    disk_full_is_clear,
    fsync_folder,
    fsync_tree,
    make_folder,
    write_durably,
)

CURRENT_NAME = "CURRENT"
HISTORY_LENGTH = 50
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """What ``CURRENT`` says.

    Attributes:
        release_id: The active release.
        manifest_sha256: Of its ``manifest.json``.
        activated: UTC time, ISO 8601.
        history: Releases active before, the most recent first; ``rollback`` goes to the first.
    """

    release_id: str
    manifest_sha256: str
    activated: str
    history: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """One JSON line with a checksum of the rest."""
        body = json.dumps(asdict(self), sort_keys=True)
        return (
            json.dumps(
                {**asdict(self), "checksum": hashlib.sha256(body.encode()).hexdigest()},
                sort_keys=True,
            ).encode()
            + b"\n"
        )

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Current:
        """Inverse of ``to_bytes``; refuses any changed byte.

        Raises:
            ReleaseCorrupt: The content is not what was written.
        """
        try:
            values = json.loads(content)
            del values["checksum"]
            current = cls(**{**values, "history": tuple(values["history"])})
            if current.to_bytes() == content and _ID.fullmatch(current.release_id):
                return current
        except (ValueError, KeyError, TypeError):
            pass
        raise ReleaseCorrupt(
            f"{where}: CURRENT was changed or cut ({len(content)} bytes). Name the release to serve"
            " again: omni release activate RELEASE_ID"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseSummary:
    """One line of ``omni release list``."""

    release_id: str
    active: bool
    created: str
    space_id: str
    parent: str | None
    entities: dict[str, int]
    size_bytes: int
    error: str | None = None


def check_release_id(release_id: str) -> str:
    """Return ``release_id`` if it can be a folder name.

    Raises:
        ReleaseError: It holds other characters than letters, digits, ``.``, ``_`` and ``-``, or
            starts with a dot.
    """
    if not _ID.fullmatch(release_id):
        raise ReleaseError(
            "a release id has 1 to 128 letters, digits, '.', '_' or '-' and starts with a letter"
            f" or digit, but got {release_id[:140]!r}"
        )
    return release_id


def _age(path: Path) -> tuple[str, int, str]:
    """Sort key of a release folder: when it was built; of a damaged one, when its manifest was written."""
    written = (path / MANIFEST_NAME).stat().st_mtime_ns
    try:
        created = str(read_manifest(path).measured.get("created", ""))
    except ReleaseError:
        created = ""
    return (
        created or datetime.fromtimestamp(written / 1e9, UTC).isoformat(timespec="milliseconds"),
        written,
        path.name,
    )


class ReleaseStore:
    """The folder ``root`` with ``releases/`` and ``live/`` inside.

    Any number of processes may use one store at the same time.
    """

    def __init__(self, root: Path | str) -> None:
        root = Path(root)
        self.root = (
            root.parent if root.name == "releases" else root
        )  # naming the inner folder means the same store
        self.releases = self.root / "releases"
        self.live_root = self.root / "live"
        self._locks = self.releases / ".locks"

    # --- reading ----------------------------------------------------------------------------------

    def path_of(self, release_id: str) -> Path:
        """Folder of a release, whether it exists or not."""
        return self.releases / check_release_id(release_id)

    def current_record(self) -> Current | None:
        """What is active now; None when nothing was ever activated.

        Raises:
            ReleaseCorrupt: ``CURRENT`` was damaged.
        """
        try:
            content = (self.releases / CURRENT_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Current.from_bytes(content, str(self.releases))

    def current(self) -> str | None:
        """Id of the active release, or None. Cheap enough to call several times a second."""
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
        lease: FileLock | None = None
        if path.is_dir() and os.access(self.releases, os.W_OK):
            make_folder(self._locks)
            lease = self._lease(release_id)
            if not lease.acquire(shared=True, timeout_seconds=5.0):
                raise PublisherBusy(
                    f"release {release_id} is being removed by another process; choose another one"
                )
        try:
            return Release.open(
                path, verify=verify, expected_sha256=expected_sha256, lease=lease, graphs=graphs
            )
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    def _lease(self, release_id: str) -> FileLock:
        return FileLock(self._locks / f"open-{release_id}.lock")

    def ids(self) -> list[str]:
        """Ids of all published releases, oldest first (by creation time, then name)."""
        if not self.releases.is_dir():
            return []
        folders = [
            p
            for p in self.releases.iterdir()
            if not p.name.startswith(".") and (p / MANIFEST_NAME).is_file()
        ]
        return [p.name for p in sorted(folders, key=_age)]

    def damaged_ids(self) -> list[str]:
        """Ids that ``ids`` does not see, by name: folders that lost their manifest, and an active release that is gone."""
        folders = self.releases.iterdir() if self.releases.is_dir() else ()
        found = {
            p.name
            for p in folders
            if _ID.fullmatch(p.name) and not (p / MANIFEST_NAME).is_file() and p.is_dir()
        }
        active = self._readable_current()
        if active is not None and not (self.path_of(active) / MANIFEST_NAME).is_file():
            found.add(active)
        return sorted(found)

    def earlier(self) -> list[str]:
        """Releases that were active before the current one and still exist, the most recent first; ``rollback`` goes to the first.

        Raises:
            ReleaseCorrupt: ``CURRENT`` was damaged.
        """
        record = self.current_record()
        return (
            [h for h in record.history if (self.path_of(h) / MANIFEST_NAME).is_file()]
            if record
            else []
        )

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
        """All releases, oldest first; a damaged one is listed with its error, those of ``damaged_ids`` last."""
        active = self._readable_current()
        result = []
        for release_id in (*self.ids(), *self.damaged_ids()):
            try:
                manifest = self._manifest(release_id)
            except ReleaseError as error:
                result.append(
                    ReleaseSummary(
                        release_id=release_id,
                        active=release_id == active,
                        created="",
                        space_id="",
                        parent=None,
                        entities={},
                        size_bytes=0,
                        error=str(error),
                    )
                )
                continue
            result.append(
                ReleaseSummary(
                    release_id=release_id,
                    active=release_id == active,
                    created=str(manifest.measured.get("created", "")),
                    space_id=manifest.space_id,
                    parent=manifest.parent,
                    entities={name: entity.count for name, entity in manifest.entities.items()},
                    size_bytes=manifest.total_bytes(),
                )
            )
        return result

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
        """Folder of an unfinished build; the same ``key`` finds what an interrupted build left.

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
        target = self.path_of(manifest.release_id)
        content = manifest.to_bytes()
        with self.lock("publish", wait_seconds=60.0):
            active = self.current()
            if require_parent and active != manifest.parent:
                raise PublishError(
                    f"this partial rebuild took indexes over from {manifest.parent}, but {active}"
                    " became active meanwhile. Nothing was published; run it again."
                )
            if target.exists():
                if read_manifest(target).files != manifest.files:
                    raise PublisherBusy(
                        f"a release {manifest.release_id!r} with other content exists already;"
                        " choose another --release-id"
                    )
                shutil.rmtree(staging)
            else:
                check_names_and_sizes(staging, manifest)
                with disk_full_is_clear("publishing the release", self.releases):
                    write_durably(staging / MANIFEST_NAME, content)
                    fsync_tree(staging)
                    os.rename(staging, target)
                    fsync_folder(self.releases)
            if activate:
                self._set_current(manifest.release_id)
        return manifest.release_id

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

    def rollback(self, *, verify: bool = True) -> str:
        """Go back to the release that was active before the current one; calling it again goes further back.

        Returns:
            Id of the release that is active now.

        Raises:
            ReleaseNotFound: There is nothing to go back to, or it was collected.
        """
        with self.lock("publish", wait_seconds=60.0):
            history = self.earlier()
            if not history:
                raise ReleaseNotFound(
                    "there is no earlier release to roll back to: only one was ever active, or the"
                    " earlier ones were collected"
                )
            target = history[0]
            if verify:
                self.verify(target)
            self._write_current(target, tuple(history[1:]))
            return target

    def _set_current(self, release_id: str) -> str | None:
        try:
            record = self.current_record()
        except ReleaseCorrupt:  # naming a release again is the way out of a damaged CURRENT
            record = None
        if record is not None and record.release_id == release_id:
            self._write_current(release_id, record.history)
            return release_id
        before = (
            ()
            if record is None
            else (record.release_id, *(h for h in record.history if h != record.release_id))
        )
        self._write_current(
            release_id, tuple(h for h in before if h != release_id)[:HISTORY_LENGTH]
        )
        return record.release_id if record else None

    def _write_current(self, release_id: str, history: tuple[str, ...]) -> None:
        digest = hashlib.sha256((self.path_of(release_id) / MANIFEST_NAME).read_bytes()).hexdigest()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        write_durably(
            self.releases / CURRENT_NAME,
            Current(
                release_id=release_id, manifest_sha256=digest, activated=now, history=history
            ).to_bytes(),
        )

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

        Returns:
            Ids of removed releases.

        Raises:
            ReleaseError: ``keep`` is below 1.
            PublisherBusy: Another process is publishing.
        """
        if keep < 1:
            raise ReleaseError(f"gc keeps at least 1 release, but keep is {keep}")
        removed = []
        with self.lock("publish", wait_seconds=10.0):
            record = self.current_record()
            ids = self.ids()
            stay = set(ids[-keep:])
            if not dry_run:
                # first: a release may have the id of one that a killed gc had moved away
                self._empty_trash()
            if record is not None:
                stay.add(record.release_id)
                stay.update([h for h in record.history if h in ids][:1])
            for release_id in ids:
                if release_id in stay:
                    continue
                lease = self._lease(release_id)
                if not lease.acquire():
                    continue  # some process serves it
                try:
                    if not dry_run:
                        trash = self.releases / f".trash-{release_id}"
                        os.rename(self.releases / release_id, trash)
                        fsync_folder(self.releases)
                        shutil.rmtree(trash)
                        lease.path.unlink(missing_ok=True)
                    removed.append(release_id)
                finally:
                    lease.release()
            if not dry_run:
                self._remove_leftovers()
                if drop_folded_log:
                    self._drop_folded_log()
        return removed

    def _empty_trash(self) -> None:
        for path in self.releases.glob(".trash-*"):
            shutil.rmtree(path)

    def _remove_leftovers(self) -> None:
        for path in self.releases.glob(f".{CURRENT_NAME}.*.tmp"):
            path.unlink(missing_ok=True)
        build = FileLock(self._locks / "build.lock")
        if build.acquire():  # nobody builds: what is staged was left by a process that died
            try:
                for path in self.releases.glob(".staging-*"):
                    shutil.rmtree(path)
            finally:
                build.release()

    def _drop_folded_log(self) -> None:
        watermarks: dict[str, int] = {}
        for release_id in self.ids():
            for entity_type, entity in read_manifest(self.releases / release_id).entities.items():
                watermarks[entity_type] = min(
                    entity.watermark, watermarks.get(entity_type, entity.watermark)
                )
        for entity_type, watermark in watermarks.items():
            collect_files(self.live_root, entity_type, watermark)
