"""Keep engaged queries on disk and update them slice by slice, at the cost of the slice alone.

Layout: ``state.db`` (SQLite: totals per entity and query, how many events each user has behind each
total, and which part files count; all of an entity lies together, so that a day's change touches
few pages however long the history) and ``events/<day>-<version>.parquet`` (the distinct events of a
day, needed to drop them when they expire and to recognise repeats). Users appear only as a keyed
64-bit hash; the key lives in the state. A change is one transaction.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import polars as pl

from encoders.enrichment.engaged_queries import (
    ENGAGED_KEY,
    FEATURE_SCHEMA,
    EngagedQueriesConfig,
    counted_events,
)
from encoders.errors import ConfigError, DataError
from encoders.tables.files import write_table
from encoders.text.normal_forms import fold_query, folded_queries

FORMAT_VERSION = 2
DAY_MICROSECONDS = 86_400_000_000

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE parts (day INTEGER NOT NULL, file TEXT PRIMARY KEY, events INTEGER NOT NULL);
CREATE INDEX parts_by_day ON parts (day);
CREATE TABLE entities (
    entity INTEGER PRIMARY KEY, entity_type TEXT NOT NULL, entity_id TEXT NOT NULL,
    UNIQUE (entity_type, entity_id)
);
CREATE TABLE totals (
    entity INTEGER NOT NULL, query TEXT NOT NULL, id INTEGER NOT NULL, score INTEGER NOT NULL,
    users INTEGER NOT NULL, PRIMARY KEY (entity, query)
) WITHOUT ROWID;
CREATE TABLE people (
    entity INTEGER NOT NULL, total INTEGER NOT NULL, person INTEGER NOT NULL,
    events INTEGER NOT NULL, PRIMARY KEY (entity, total, person)
) WITHOUT ROWID;
CREATE TABLE deleted_people (person INTEGER PRIMARY KEY);
CREATE TABLE deleted_queries (query TEXT PRIMARY KEY);
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, what TEXT NOT NULL, until TEXT NOT NULL, added INTEGER NOT NULL,
    removed INTEGER NOT NULL, at TEXT NOT NULL
);
"""
"""Tables of the state; ``person`` is a user's keyed hash."""

STORED = {
    **{name: FEATURE_SCHEMA.get(name, pl.String()) for name in ENGAGED_KEY},
    "timestamp": pl.Datetime("us", "UTC"),
    "user_id": pl.Int64(),
}
"""Columns of a part file: an event, with the user's keyed hash for the user id."""


class StateError(DataError):
    """The state is missing, damaged, of another format version, or was made with other settings."""


class Merge(NamedTuple):
    """What one change of the state did."""

    version: int
    changed: pl.DataFrame
    """New engaged queries (``FEATURE_SCHEMA``) of the entities that were touched."""
    touched: pl.DataFrame
    """``entity_type, entity_id`` of every entity whose engaged queries may have changed.

    Totals below ``min_users`` before and after cannot change them. An entity without rows in
    ``changed`` has no engaged query now.
    """
    counts: dict[str, int]
    """Events ``given``, ``added``, ``repeated``, ``too_old`` on arrival, and that ``expired``.

    ``deleted``: those of users and queries that were deleted earlier.
    """


class _Part(NamedTuple):
    """A file of events, as the table ``parts`` lists it."""

    day: int
    """Days since 1970-01-01 UTC."""
    file: str
    events: int


class _Change(NamedTuple):
    """Events that enter and leave the state, and the files that hold them."""

    added: pl.DataFrame
    """Columns of ``STORED``."""
    removed: pl.DataFrame
    """Columns of ``STORED``."""
    new_parts: list[_Part]
    """Files written for this change, not counted yet."""
    old_files: list[str]
    """Files that no longer count."""
    until: datetime | None
    """End of the window after the change."""


@dataclass
class _TotalRows:
    """Rows of ``totals`` and ``people`` that one change writes or deletes."""

    next_total: int
    people: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Entity, total, person, events."""
    dead_people: list[tuple[int, int, int]] = field(default_factory=list)
    """Entity, total, person."""
    totals: list[tuple[int, str, int, int, int]] = field(default_factory=list)
    """Entity, query, total, score, users."""
    dead_totals: list[tuple[int, str]] = field(default_factory=list)
    """Entity, query."""

    def write(self, db: sqlite3.Connection) -> None:
        """Write and delete the rows, and entities that are left without a total."""
        db.executemany("INSERT OR REPLACE INTO people VALUES (?, ?, ?, ?)", self.people)
        db.executemany(
            "DELETE FROM people WHERE entity = ? AND total = ? AND person = ?", self.dead_people
        )
        db.executemany(
            "INSERT INTO totals VALUES (?, ?, ?, ?, ?) ON CONFLICT (entity, query) DO UPDATE SET"
            " score = excluded.score, users = excluded.users",
            self.totals,
        )
        db.executemany("DELETE FROM totals WHERE entity = ? AND query = ?", self.dead_totals)
        db.executemany(
            "DELETE FROM entities WHERE entity = ?1 AND NOT EXISTS (SELECT 1 FROM totals WHERE"
            " entity = ?1)",
            sorted({(entity,) for entity, _ in self.dead_totals}),
        )
        db.execute("UPDATE meta SET value = ? WHERE name = 'next_total'", (str(self.next_total),))


class EngagedQueriesState:
    """Hold the engaged queries of a moving window on disk; one process writes.

    ``merge``, ``delete_users`` and ``delete_queries`` change it.
    """

    def __init__(self, folder: Path, config: EngagedQueriesConfig) -> None:
        """Open a state; ``create`` makes a new one.

        Raises:
            StateError: There is none, its format is unknown, or it was made with another window or
                other weights.
        """
        self.folder = folder
        self.config = config
        path = folder / "state.db"
        if not path.is_file():
            raise StateError(
                f"{folder}: expected an engaged-queries state (state.db), but there is none. Create"
                " one with --create."
            )
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.execute("PRAGMA cache_size = -65536")  # 64 MiB of pages
            meta = dict(self._db.execute("SELECT name, value FROM meta"))
        except sqlite3.DatabaseError as error:
            raise StateError(
                f"{path}: not a readable state ({error}). Restore it from a copy, or build it again"
                " from the logs."
            ) from error
        if int(meta["format_version"]) != FORMAT_VERSION:
            raise StateError(
                f"{path}: format version {meta['format_version']}, this program reads"
                f" {FORMAT_VERSION}. Build it again from the logs."
            )
        fixed = _fixed_settings(config)
        if json.loads(meta["settings"]) != fixed:
            self.close()
            raise StateError(
                f"{path}: was made with {meta['settings']}, but got {json.dumps(fixed)}. Totals"
                " cannot be re-weighted: build a new state."
            )
        self._key = bytes.fromhex(meta["key"])
        self._remove_orphans()
        self._index_features(meta["feature_users"])

    @classmethod
    def create(cls, folder: Path, config: EngagedQueriesConfig) -> EngagedQueriesState:
        """Make an empty state.

        Raises:
            StateError: There already is one.
        """
        path = folder / "state.db"
        if path.exists():
            raise StateError(f"{folder}: already holds a state. Open it, or name another folder.")
        (folder / "events").mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.executescript("PRAGMA journal_mode = WAL;" + SCHEMA)
            meta = {
                "format_version": str(FORMAT_VERSION),
                "settings": json.dumps(_fixed_settings(config)),
                "key": os.urandom(16).hex(),
                "until": "",
                "version": "0",
                "next_total": "1",
                "feature_users": "",
            }
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        return cls(folder, config)

    def close(self) -> None:
        """Release the files."""
        self._db.close()

    def __enter__(self) -> EngagedQueriesState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """Return the number of changes so far."""
        return int(self._meta("version"))

    @property
    def until(self) -> datetime | None:
        """Return the end of the window (exclusive, a midnight in UTC); None: the state is empty."""
        text = self._meta("until")
        return datetime.fromisoformat(text) if text else None

    def merge(
        self, events: pl.DataFrame, *, until: datetime | None = None, what: str = "merge"
    ) -> Merge:
        """Count one slice of events, of any days in any order, and drop what leaves the window.

        Merging slices one by one, late and repeated ones included, gives what ``engaged_queries``
        gives over all events at once.

        Args:
            events: Columns of ``events.EVENT_SCHEMA``; may be empty.
            until: Move the end of the window to this midnight (UTC) or later; None: to the midnight
                after the last event.
            what: Label for the list of versions.

        Raises:
            ConfigError: ``until`` is not a midnight in UTC.
        """
        if until is not None and until != _midnight_before(until):
            raise ConfigError(
                "until must be a midnight in UTC (the state counts whole days), got"
                f" {until.isoformat()}"
            )
        counts = {"given": events.height}
        counted = counted_events(events, self.config)
        last = counted["timestamp"].max()
        after_last = _midnight_after(last) if isinstance(last, datetime) else None
        ends = [end for end in (self.until, until, after_last) if end is not None]
        if not ends:
            unchanged = pl.DataFrame(schema=FEATURE_SCHEMA)
            return Merge(self.version, unchanged, _no_entities(), {**counts, "added": 0})
        end = max(ends)
        start = end - timedelta(days=self.config.window_days)
        in_window = counted.filter(pl.col("timestamp") >= start)
        counts["too_old"] = counted.height - in_window.height
        hashed = in_window.with_columns(self._hash_users(in_window["user_id"]).alias("user_id"))
        allowed = self._without_deleted(hashed)
        counts["deleted"] = hashed.height - allowed.height
        fresh = self._without_stored(allowed)
        counts["repeated"] = allowed.height - fresh.height
        expired_files = self._files("day < ?", (_day(start),))
        expired = self._read(expired_files)
        counts["added"] = fresh.height
        counts["expired"] = expired.height
        change = _Change(
            added=fresh,
            removed=expired,
            new_parts=self._write_parts(fresh),
            old_files=[file.name for file in expired_files],
            until=end,
        )
        return self._commit(change, what, counts)

    def delete_users(self, user_ids: Collection[str]) -> Merge:
        """Delete users: their events stop counting, leave the disk, and are refused later."""
        ids = pl.Series("user_id", list(user_ids), dtype=pl.String)
        users = self._hash_users(ids.str.normalize("NFC")).to_list()  # as logs are read
        self._db.executemany(
            "INSERT OR IGNORE INTO deleted_people VALUES (?)", ((user,) for user in users)
        )
        return self._delete(pl.col("user_id").is_in(users), "delete users")

    def delete_queries(self, queries: Collection[str]) -> Merge:
        """Delete query texts in every spelling (``fold_query``), as ``delete_users`` does users."""
        forms = folded_queries(queries)
        self._db.executemany(
            "INSERT OR IGNORE INTO deleted_queries VALUES (?)", ((form,) for form in forms)
        )
        return self._delete(fold_query(pl.col("query")).is_in(forms), "delete queries")

    def features(self) -> pl.DataFrame:
        """Read the engaged queries of every entity, as ``FEATURE_SCHEMA``, from all totals."""
        entities = self._db.execute(
            "SELECT entity, entity_type, entity_id FROM entities ORDER BY entity_type, entity_id"
        )
        return self._features_of(entities.fetchall())

    def versions(self) -> list[dict[str, object]]:
        """List every change of the state, oldest first."""
        names = ("version", "what", "until", "added", "removed", "at")
        return [
            dict(zip(names, row, strict=True))
            for row in self._db.execute(f"SELECT {', '.join(names)} FROM versions ORDER BY version")
        ]

    # -- reading -----------------------------------------------------------------------------------

    def _meta(self, name: str) -> str:
        return str(self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])

    def _hash_users(self, user_ids: pl.Series) -> pl.Series:
        """Hash user ids with the state's key, int64."""
        distinct = user_ids.unique()
        if not len(distinct):
            return pl.Series("user_id", dtype=pl.Int64)
        digests = (
            hashlib.blake2b(user.encode(), digest_size=8, key=self._key).digest()
            for user in distinct.to_list()
        )
        hashes = [int.from_bytes(digest, "little", signed=True) for digest in digests]
        return user_ids.replace_strict(
            distinct, pl.Series(hashes, dtype=pl.Int64), return_dtype=pl.Int64
        )

    def _without_deleted(self, events: pl.DataFrame) -> pl.DataFrame:
        users = [row[0] for row in self._db.execute("SELECT person FROM deleted_people")]
        queries = [row[0] for row in self._db.execute("SELECT query FROM deleted_queries")]
        if users:
            events = events.filter(~pl.col("user_id").is_in(users))
        if queries:
            events = events.filter(~fold_query(pl.col("query")).is_in(queries))
        return events

    def _files(self, condition: str, values: tuple[int, ...]) -> list[Path]:
        rows = self._db.execute(f"SELECT file FROM parts WHERE {condition} ORDER BY file", values)
        return [self.folder / "events" / name for (name,) in rows]

    def _read(self, files: list[Path]) -> pl.DataFrame:
        """Read the events of part files."""
        if not files:
            return pl.DataFrame(schema=STORED)
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise StateError(
                f"{self.folder}: event file {missing[0]} is missing. Restore it from a copy, or"
                " build the state again from the logs."
            )
        return pl.read_parquet(files, glob=False)

    def _without_stored(self, events: pl.DataFrame) -> pl.DataFrame:
        days = (events["timestamp"].to_physical() // DAY_MICROSECONDS).unique().to_list()
        files = [f for day in days for f in self._files("day = ?", (day,))]
        return events.join(self._read(files), on=ENGAGED_KEY, how="anti") if files else events

    def _features_of(self, entities: Iterable[tuple[int, str, str]]) -> pl.DataFrame:
        """Read the engaged queries of numbered entities, in their order."""
        statement = (
            "SELECT query, score, users FROM totals INDEXED BY best WHERE entity = ? AND users >="
            f" {self.config.min_users:d} AND score > 0 ORDER BY score DESC, users DESC, query"
            " LIMIT ?"
        )
        rows = [
            (entity_type, entity_id, query, rank, score, users)
            for entity, entity_type, entity_id in entities
            for rank, (query, score, users) in enumerate(
                self._db.execute(statement, (entity, self.config.top)), start=1
            )
        ]
        return pl.DataFrame(rows, schema=FEATURE_SCHEMA, orient="row")

    def _index_features(self, indexed_users: str) -> None:
        """Index the totals of at least ``min_users`` users, best first.

        So entities with many rare queries cost no more than others. Another ``min_users`` than last
        time reads all totals once.
        """
        wanted = f"{self.config.min_users:d}"
        if indexed_users == wanted:
            return
        self._db.executescript(
            "BEGIN IMMEDIATE; DROP INDEX IF EXISTS best; CREATE INDEX best ON totals (entity,"
            f" score DESC, users DESC, query) WHERE users >= {wanted}; UPDATE meta SET value ="
            f" '{wanted}' WHERE name = 'feature_users'; COMMIT;"
        )

    # -- writing -----------------------------------------------------------------------------------

    def _write_parts(self, events: pl.DataFrame) -> list[_Part]:
        """Write the events of each day as a new file, which counts once a transaction names it."""
        parts = []
        days = events.with_columns(
            (pl.col("timestamp").to_physical() // DAY_MICROSECONDS).alias("day")
        )
        for (day,), rows in days.partition_by("day", as_dict=True, include_key=False).items():
            date = f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m-%d}"
            name = f"{date}-{self.version + 1:08d}.parquet"
            write_table(rows.select(list(STORED)).sort(ENGAGED_KEY), self.folder / "events" / name)
            parts.append(_Part(int(day), name, rows.height))
        return parts

    def _delete(self, condition: pl.Expr, what: str) -> Merge:
        """Remove the events that match, and rewrite the files that held some."""
        none = pl.DataFrame(schema=STORED)
        removed, kept = [none], [none]
        old_files = []
        for file in self._files("1", ()):
            events = self._read([file])
            hit = events.filter(condition)
            if hit.height:
                removed.append(hit)
                kept.append(events.filter(~condition))
                old_files.append(file.name)
        change = _Change(
            added=none,
            removed=pl.concat(removed),
            new_parts=self._write_parts(pl.concat(kept)),
            old_files=old_files,
            until=self.until,
        )
        counts = {"given": 0, "added": 0, "removed": change.removed.height}
        result = self._commit(change, what, counts)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("VACUUM")  # freed pages may still hold the texts
        return result

    def _commit(self, change: _Change, what: str, counts: dict[str, int]) -> Merge:
        """Make a change in one transaction, then read the features of the entities it touched."""
        version = self.version + 1
        until = change.until.isoformat() if change.until else ""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            touched = self._apply(self._differences(change))
            old_files = ((name,) for name in change.old_files)
            db.executemany("DELETE FROM parts WHERE file = ?", old_files)
            db.executemany("INSERT INTO parts VALUES (?, ?, ?)", change.new_parts)
            db.execute("UPDATE meta SET value = ? WHERE name = 'until'", (until,))
            db.execute("UPDATE meta SET value = ? WHERE name = 'version'", (str(version),))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = (version, what, until, change.added.height, change.removed.height, now)
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        for name in change.old_files:
            (self.folder / "events" / name).unlink(missing_ok=True)
        names = pl.DataFrame(
            [row[1:] for row in touched], schema=_no_entities().schema, orient="row"
        )
        return Merge(version, self._features_of(touched), names, counts)

    def _differences(self, change: _Change) -> pl.DataFrame:
        """Sum a change to events (``sign``) and score by entity, query and user."""
        signed = pl.concat(
            [
                change.added.with_columns(sign=pl.lit(1, pl.Int64)),
                change.removed.with_columns(sign=pl.lit(-1, pl.Int64)),
            ]
        )
        return signed.group_by("entity_type", "entity_id", "query", "user_id").agg(
            pl.col("sign").sum(), (self.config.score() * pl.col("sign")).sum().alias("score")
        )

    def _apply(self, differences: pl.DataFrame) -> list[tuple[int, str, str]]:
        """Change totals and people by what ``_differences`` returned.

        Returns:
            Number, type and id of the entities whose features may have changed, sorted.
        """
        names = differences.select("entity_type", "entity_id").unique()
        names = names.sort("entity_type", "entity_id")
        numbers = [self._number(*name) for name in names.iter_rows()]
        numbered = names.with_columns(pl.Series("entity", numbers, dtype=pl.Int64))
        by_query = (
            differences.join(numbered, on=["entity_type", "entity_id"])
            .sort("entity", "query", "user_id")  # as stored
            .group_by("entity", "query", maintain_order=True)
            .agg("user_id", "sign", pl.col("score").sum())
        )
        rows = _TotalRows(next_total=int(self._meta("next_total")))
        visible: set[int] = set()
        for entity, query, users, signs, score in by_query.iter_rows():
            most_users = self._change_total((entity, query), zip(users, signs), score, rows)
            if most_users >= self.config.min_users:
                visible.add(entity)
        rows.write(self._db)
        return [
            (n, *name) for n, name in zip(numbers, names.iter_rows(), strict=True) if n in visible
        ]

    def _change_total(
        self,
        key: tuple[int, str],
        events_of_users: Iterable[tuple[int, int]],
        score: int,
        rows: _TotalRows,
    ) -> int:
        """Collect in ``rows`` the change of one total.

        Args:
            key: Entity and query.
            events_of_users: User's hash, and how many events more (less: negative) it has.
            score: How much the score grows.
            rows: Gets the rows to write and delete.

        Returns:
            The larger of the total's numbers of users before and after.
        """
        entity, query = key
        find_total = "SELECT id, score, users FROM totals WHERE entity = ? AND query = ?"
        find_person = "SELECT events FROM people WHERE entity = ? AND total = ? AND person = ?"
        found = self._db.execute(find_total, key).fetchone()
        total, old_score, old_users = found or (rows.next_total, 0, 0)
        rows.next_total += found is None
        users = old_users
        for person, sign in events_of_users:
            if sign == 0:
                continue
            row = (entity, total, person)
            before = self._db.execute(find_person, row).fetchone() if found else None
            after = (before[0] if before else 0) + sign
            users += (after > 0) - (before is not None)
            if after > 0:
                rows.people.append((*row, after))
            else:
                rows.dead_people.append(row)
        if users:
            rows.totals.append((entity, query, total, old_score + score, users))
        else:
            rows.dead_totals.append(key)
        return max(users, old_users)

    def _number(self, entity_type: str, entity_id: str) -> int:
        """Look up an entity's number, giving it the next one if it has none."""
        find = "SELECT entity FROM entities WHERE entity_type = ? AND entity_id = ?"
        found = self._db.execute(find, (entity_type, entity_id)).fetchone()
        if found:
            return int(found[0])
        add = "INSERT INTO entities (entity_type, entity_id) VALUES (?, ?)"
        return int(self._db.execute(add, (entity_type, entity_id)).lastrowid or 0)

    def _remove_orphans(self) -> None:
        """Remove files that an interrupted merge left behind."""
        counted = {name for (name,) in self._db.execute("SELECT file FROM parts")}
        for file in (self.folder / "events").glob("*.parquet"):
            if file.name not in counted:
                file.unlink(missing_ok=True)


def _fixed_settings(config: EngagedQueriesConfig) -> dict[str, object]:
    return {"weights": dict(sorted(config.weights.items())), "window_days": config.window_days}


def _midnight_before(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _midnight_after(moment: datetime) -> datetime:
    return _midnight_before(moment) + timedelta(days=1)


def _day(moment: datetime) -> int:
    return int(moment.timestamp()) // 86_400


def _no_entities() -> pl.DataFrame:
    return pl.DataFrame(schema={"entity_type": pl.String(), "entity_id": pl.String()})
