"""Which queries led to which entities, read from the state of engaged queries.

What was deleted from the state, users and queries, is in no row.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import polars as pl

from encoders.enrichment.engaged_state import FORMAT_VERSION, StateError

_PAIRS = """
SELECT t.query, e.entity_type, e.entity_id, t.score AS count, u.users
FROM totals t
JOIN entities e ON e.entity = t.entity
JOIN (
    SELECT t.query, COUNT(DISTINCT p.person) AS users
    FROM totals t JOIN people p ON p.entity = t.entity AND p.total = t.id GROUP BY t.query
) u ON u.query = t.query
WHERE t.score > 0
ORDER BY e.entity_type, t.query, e.entity_id
"""
_SCHEMA = {
    "query": pl.String(),
    "entity_type": pl.String(),
    "entity_id": pl.String(),
    "count": pl.Int64(),
    "users": pl.Int64(),
}


class EngagedPairs(NamedTuple):
    """What a state knows of queries."""

    pairs: pl.DataFrame
    """``query, entity_type, entity_id, count, users``; ``users``: distinct, of the query."""
    deleted_queries: list[str]
    """Folded texts (``fold_query``) that were deleted."""


def read_engaged_pairs(state: Path) -> EngagedPairs:
    """Read all pairs of a state; nothing is changed, also while another process writes.

    Raises:
        StateError: There is no state, or it is damaged or of another format version.
    """
    path = state / "state.db"
    if not path.is_file():
        raise StateError(
            f"{state}: expected an engaged-queries state (state.db), but there is none. `omni"
            " enrich queries --state` makes it."
        )
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            db.execute("BEGIN")  # one moment for both questions
            version = db.execute("SELECT value FROM meta WHERE name = 'format_version'").fetchone()
            if version is None or int(version[0]) != FORMAT_VERSION:
                raise StateError(
                    f"{path}: format version {version}, this program reads {FORMAT_VERSION}. Build"
                    " it again from the logs."
                )
            rows = db.execute(_PAIRS).fetchall()
            deleted = [row[0] for row in db.execute("SELECT query FROM deleted_queries")]
    except sqlite3.DatabaseError as error:
        raise StateError(
            f"{path}: not a readable state ({error}). Restore it from a copy, or build it again"
            " from the logs."
        ) from error
    return EngagedPairs(pl.DataFrame(rows, schema=_SCHEMA, orient="row"), deleted)
