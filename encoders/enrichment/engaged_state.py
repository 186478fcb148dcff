"""Engaged queries kept up to date slice by slice: a state on disk whose daily update costs in proportion to the day, not to the history.

Layout: ``state.db`` (SQLite: totals per entity and query, how many events each person has behind
each total, and which part files count; all of an entity lies together, so that a day's change
touches few pages however long the history) and ``events/<day>-<version>.parquet`` (the distinct
events of a day, needed to drop them when they expire and to recognise repeats). People appear only
as a keyed 64-bit hash; the key lives in the state. A merge is one transaction: it counts wholly or
not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing
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
CREATE TABLE entities (entity INTEGER PRIMARY KEY, entity_type TEXT NOT NULL, entity_id TEXT NOT NULL, UNIQUE (entity_type, entity_id));
CREATE TABLE totals (
    entity INTEGER NOT NULL, query TEXT NOT NULL, id INTEGER NOT NULL, score INTEGER NOT NULL, users INTEGER NOT NULL,
    PRIMARY KEY (entity, query)
) WITHOUT ROWID;
CREATE TABLE people (
    entity INTEGER NOT NULL, total INTEGER NOT NULL, person INTEGER NOT NULL, events INTEGER NOT NULL,
    PRIMARY KEY (entity, total, person)
) WITHOUT ROWID;
CREATE TABLE deleted_people (person INTEGER PRIMARY KEY);
CREATE TABLE deleted_queries (query TEXT PRIMARY KEY);
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, what TEXT NOT NULL, until TEXT NOT NULL, added INTEGER NOT NULL, removed INTEGER NOT NULL, at TEXT NOT NULL
);
"""

STORED = {
    **{name: FEATURE_SCHEMA.get(name, pl.String()) for name in ENGAGED_KEY},
    "timestamp": pl.Datetime("us", "UTC"),
    "user_id": pl.Int64(),
}
"""Columns of a part file: an event, with the person's keyed hash for the user id."""


class StateError(DataError):
    """The state is missing, damaged, of another format version, or was made with other settings."""


class Merge(NamedTuple):
    """What one change of the state did."""

    version: int
    changed: pl.DataFrame
    """New engaged queries (``FEATURE_SCHEMA``) of the entities that were touched."""
    touched: pl.DataFrame
    """``entity_type, entity_id`` of every entity whose engaged queries may have changed (totals below ``min_users`` before and after cannot
    change them); one without rows in ``changed`` has no engaged query now.
    """
    counts: dict[str, int]
    """Events ``given``, ``added``, ``repeated``, ``too_old`` on arrival, of ``deleted`` people or queries, and those that ``expired``."""


class EngagedQueriesState:
    """The engaged queries of a moving window, changed by :meth:`merge`, :meth:`delete_users` and :meth:`delete_queries`. One writer."""

    def __init__(self, folder: Path, config: EngagedQueriesConfig) -> None:
        """Open a state; :meth:`create` makes a new one.

        Raises:
            StateError: There is none, its format is unknown, or it was made with another window or
                other weights.
        """
        self.folder, self.config = folder, config
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
                f"{path}: was made with {meta['settings']}, asked for {json.dumps(fixed)}. Totals"
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
        """Number of changes so far."""
        return int(self._meta("version"))

    @property
    def until(self) -> datetime | None:
        """End of the window (exclusive, a midnight in UTC); None while the state is empty."""
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
        ends = [
            e
            for e in (
                self.until,
                until,
                _midnight_after(last) if isinstance(last, datetime) else None,
            )
            if e is not None
        ]
        if not ends:
            return Merge(
                self.version,
                pl.DataFrame(schema=FEATURE_SCHEMA),
                _no_entities(),
                {**counts, "added": 0},
            )
        end = max(ends)
        start = end - timedelta(days=self.config.window_days)
        in_window = counted.filter(pl.col("timestamp") >= start)
        counts["too_old"] = counted.height - in_window.height
        hashed = in_window.with_columns(self._people(in_window["user_id"]).alias("user_id"))
        allowed = self._without_deleted(hashed)
        counts["deleted"] = hashed.height - allowed.height
        fresh = self._without_stored(allowed)
        counts["repeated"] = allowed.height - fresh.height
        expired = self._read(self._files("day < ?", (_day(start),)))
        counts["added"], counts["expired"] = fresh.height, expired.height
        gone = [
            name
            for name, _ in self._db.execute(
                "SELECT file, day FROM parts WHERE day < ?", (_day(start),)
            )
        ]
        return self._commit(fresh, expired, gone, self._write_parts(fresh), end, what, counts)

    def delete_users(self, user_ids: Collection[str]) -> Merge:
        """Forget people: their events stop counting, leave the disk, and are refused should they arrive again."""
        people = self._people(
            pl.Series("user_id", list(user_ids), dtype=pl.String).str.normalize("NFC")
        )  # as logs are read
        self._db.executemany(
            "INSERT OR IGNORE INTO deleted_people VALUES (?)", ((p,) for p in people.to_list())
        )
        return self._forget(pl.col("user_id").is_in(people.to_list()), "delete users")

    def delete_queries(self, queries: Collection[str]) -> Merge:
        """Forget query texts, however spelt (``fold_query``): they stop counting, leave the disk, and are refused from then on."""
        self._db.executemany(
            "INSERT OR IGNORE INTO deleted_queries VALUES (?)",
            ((q,) for q in folded_queries(queries)),
        )
        return self._forget(
            fold_query(pl.col("query")).is_in(folded_queries(queries)), "delete queries"
        )

    def features(self) -> pl.DataFrame:
        """Engaged queries of every entity, as ``FEATURE_SCHEMA`` (reads the whole state)."""
        entities = self._db.execute(
            "SELECT entity, entity_type, entity_id FROM entities ORDER BY entity_type, entity_id"
        )
        return self._features_of(entities.fetchall())

    def versions(self) -> list[dict[str, object]]:
        """Every change of the state, oldest first."""
        names = ("version", "what", "until", "added", "removed", "at")
        return [
            dict(zip(names, row, strict=True))
            for row in self._db.execute(f"SELECT {', '.join(names)} FROM versions ORDER BY version")
        ]

    # -- reading -----------------------------------------------------------------------------------

    def _meta(self, name: str) -> str:
        return str(self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])

    def _people(self, user_ids: pl.Series) -> pl.Series:
        distinct = user_ids.unique()
        keyed = [
            int.from_bytes(
                hashlib.blake2b(u.encode(), digest_size=8, key=self._key).digest(),
                "little",
                signed=True,
            )
            for u in distinct.to_list()
        ]
        if not keyed:
            return pl.Series("user_id", dtype=pl.Int64)
        return user_ids.replace_strict(
            distinct, pl.Series(keyed, dtype=pl.Int64), return_dtype=pl.Int64
        )

    def _without_deleted(self, events: pl.DataFrame) -> pl.DataFrame:
        people = [row[0] for row in self._db.execute("SELECT person FROM deleted_people")]
        queries = [row[0] for row in self._db.execute("SELECT query FROM deleted_queries")]
        if people:
            events = events.filter(~pl.col("user_id").is_in(people))
        return events.filter(~fold_query(pl.col("query")).is_in(queries)) if queries else events

    def _files(self, condition: str, values: tuple[int, ...]) -> list[Path]:
        rows = self._db.execute(f"SELECT file FROM parts WHERE {condition} ORDER BY file", values)
        return [self.folder / "events" / name for (name,) in rows]

    def _read(self, files: list[Path]) -> pl.DataFrame:
        if not files:
            return pl.DataFrame(schema=STORED)
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise StateError(
                f"{self.folder}: event file {missing[0]} is missing. Restore it from a copy, or"
                " build the state again from the logs."
            )
        return pl.read_parquet(files)

    def _without_stored(self, events: pl.DataFrame) -> pl.DataFrame:
        days = (events["timestamp"].to_physical() // DAY_MICROSECONDS).unique().to_list()
        files = [f for day in days for f in self._files("day = ?", (day,))]
        return events.join(self._read(files), on=ENGAGED_KEY, how="anti") if files else events

    def _features_of(self, entities: Iterable[tuple[int, str, str]]) -> pl.DataFrame:
        statement = (
            "SELECT query, score, users FROM totals INDEXED BY best WHERE entity = ? AND users >="
            f" {self.config.min_users:d} AND score > 0 ORDER BY score DESC, users DESC, query"
            " LIMIT ?"
        )
        columns: list[list[object]] = [[] for _ in FEATURE_SCHEMA]
        for entity, entity_type, entity_id in entities:
            found = self._db.execute(statement, (entity, self.config.top)).fetchall()
            n = len(found)
            if n:
                queries, scores, users = zip(*found, strict=True)
                for column, values in zip(
                    columns,
                    ([entity_type] * n, [entity_id] * n, queries, range(1, n + 1), scores, users),
                    strict=True,
                ):
                    column.extend(values)
        return pl.DataFrame(dict(zip(FEATURE_SCHEMA, columns, strict=True)), schema=FEATURE_SCHEMA)

    def _index_features(self, indexed_users: str) -> None:
        """Index the totals of at least ``min_users`` people, best first: entities with many rare queries cost no more than others.

        Another ``min_users`` than last time reads all totals once.
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

    def _write_parts(self, events: pl.DataFrame) -> list[tuple[int, str, int]]:
        """Write the events of each day as a new file; the files count only once the transaction names them."""
        parts = []
        days = events.with_columns(
            (pl.col("timestamp").to_physical() // DAY_MICROSECONDS).alias("day")
        )
        for (day,), rows in days.partition_by("day", as_dict=True, include_key=False).items():
            name = f"{datetime.fromtimestamp(day * 86_400, UTC):%Y-%m-%d}-{self.version + 1:08d}.parquet"
            write_table(rows.select(list(STORED)).sort(ENGAGED_KEY), self.folder / "events" / name)
            parts.append((int(day), name, rows.height))
        return parts

    def _forget(self, condition: pl.Expr, what: str) -> Merge:
        forgotten, rewritten, gone = [], [], []
        for file in self._files("1", ()):
            events = self._read([file])
            hit = events.filter(condition)
            if hit.height:
                forgotten.append(hit)
                rewritten.append(events.filter(~condition))
                gone.append(file.name)
        removed = pl.concat(forgotten) if forgotten else pl.DataFrame(schema=STORED)
        kept = pl.concat(rewritten) if rewritten else pl.DataFrame(schema=STORED)
        end = self.until
        counts = {"given": 0, "added": 0, "removed": removed.height}
        result = self._commit(
            removed.clear(), removed, gone, self._write_parts(kept), end, what, counts
        )
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("VACUUM")  # freed pages may still hold the texts
        return result

    def _commit(
        self,
        added: pl.DataFrame,
        removed: pl.DataFrame,
        gone: list[str],
        parts: list[tuple[int, str, int]],
        end: datetime | None,
        what: str,
        counts: dict[str, int],
    ) -> Merge:
        """Add and take away events in one transaction, then read the features of the entities they touched."""
        score = self.config.score()
        delta = (
            pl.concat(
                [
                    added.with_columns(sign=pl.lit(1, pl.Int64)),
                    removed.with_columns(sign=pl.lit(-1, pl.Int64)),
                ]
            )
            .group_by("entity_type", "entity_id", "query", "user_id")
            .agg(pl.col("sign").sum(), (score * pl.col("sign")).sum().alias("score"))
        )
        version, window_end = self.version + 1, end.isoformat() if end else ""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            touched = self._apply(delta)
            self._db.executemany("DELETE FROM parts WHERE file = ?", ((name,) for name in gone))
            self._db.executemany("INSERT INTO parts VALUES (?, ?, ?)", parts)
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'until'", (window_end,))
            self._db.execute("UPDATE meta SET value = ? WHERE name = 'version'", (str(version),))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            row = (version, what, window_end, added.height, removed.height, now)
            self._db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", row)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        for name in gone:
            (self.folder / "events" / name).unlink(missing_ok=True)
        names = pl.DataFrame(
            [row[1:] for row in touched], schema=_no_entities().schema, orient="row"
        )
        return Merge(version, self._features_of(touched), names, counts)

    def _apply(self, delta: pl.DataFrame) -> list[tuple[int, str, str]]:
        """Change totals and people by ``delta``; returns number, type and id of the entities whose features may have changed, sorted."""
        db = self._db
        names = delta.select("entity_type", "entity_id").unique().sort("entity_type", "entity_id")
        numbers = [self._number(*name) for name in names.iter_rows()]
        pairs = (
            delta.join(
                names.with_columns(pl.Series("entity", numbers, dtype=pl.Int64)),
                on=["entity_type", "entity_id"],
            )
            .sort("entity", "query", "user_id")  # as stored
            .group_by("entity", "query", maintain_order=True)
            .agg("user_id", "sign", pl.col("score").sum())
        )
        next_total = int(self._meta("next_total"))
        kept_people: list[tuple[int, int, int, int]] = []
        dead_people: list[tuple[int, int, int]] = []
        kept_totals: list[tuple[int, str, int, int, int]] = []
        dead_totals: list[tuple[int, str]] = []
        visible: set[int] = set()
        find_total = "SELECT id, score, users FROM totals WHERE entity = ? AND query = ?"
        find_person = "SELECT events FROM people WHERE entity = ? AND total = ? AND person = ?"
        for entity, query, people, signs, score in pairs.iter_rows():
            found = db.execute(find_total, (entity, query)).fetchone()
            total, old_score, old_users = found or (next_total, 0, 0)
            next_total += found is None
            users = old_users
            for person, sign in zip(people, signs, strict=True):
                if sign == 0:
                    continue
                before = (
                    db.execute(find_person, (entity, total, person)).fetchone() if found else None
                )
                after = (before[0] if before else 0) + sign
                users += (after > 0) - (before is not None)
                if after > 0:
                    kept_people.append((entity, total, person, after))
                else:
                    dead_people.append((entity, total, person))
            if users:
                kept_totals.append((entity, query, total, old_score + score, users))
            else:
                dead_totals.append((entity, query))
            if max(users, old_users) >= self.config.min_users:
                visible.add(entity)
        db.executemany("INSERT OR REPLACE INTO people VALUES (?, ?, ?, ?)", kept_people)
        db.executemany(
            "DELETE FROM people WHERE entity = ? AND total = ? AND person = ?", dead_people
        )
        upsert = (
            "ON CONFLICT (entity, query) DO UPDATE SET score = excluded.score, users ="
            " excluded.users"
        )
        db.executemany(f"INSERT INTO totals VALUES (?, ?, ?, ?, ?) {upsert}", kept_totals)
        db.executemany("DELETE FROM totals WHERE entity = ? AND query = ?", dead_totals)
        emptied = (
            "DELETE FROM entities WHERE entity = ?1 AND NOT EXISTS (SELECT 1 FROM totals WHERE"
            " entity = ?1)"
        )
        db.executemany(emptied, sorted({(entity,) for entity, _ in dead_totals}))
        db.execute("UPDATE meta SET value = ? WHERE name = 'next_total'", (str(next_total),))
        return [
            (n, *name) for n, name in zip(numbers, names.iter_rows(), strict=True) if n in visible
        ]

    def _number(self, entity_type: str, entity_id: str) -> int:
        find = "SELECT entity FROM entities WHERE entity_type = ? AND entity_id = ?"
        found = self._db.execute(find, (entity_type, entity_id)).fetchone()
        add = "INSERT INTO entities (entity_type, entity_id) VALUES (?, ?)"
        return int(
            found[0] if found else self._db.execute(add, (entity_type, entity_id)).lastrowid or 0
        )

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
