"""Small logs for tests: random events with repeats, and simulated ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
from hypothesis import strategies as st

from encoders.logs.events import EVENT_SCHEMA

START = datetime(2024, 1, 1, tzinfo=UTC)


def events_of(*rows: tuple[float, str, str, str, str, str]) -> pl.DataFrame:
    """Events from (day, query, user, entity type, entity, action)."""
    return pl.DataFrame(
        [
            (START + timedelta(days=day), query, "", "", user, entity_type, entity, action)
            for day, query, user, entity_type, entity, action in rows
        ],
        schema=EVENT_SCHEMA,
        orient="row",
    )


event_rows = st.tuples(
    st.integers(0, 40).map(float),
    st.sampled_from(["cat", "Cat", "red dog", "дом"]),
    st.sampled_from(["", "u1", "u2", "u3", "u4"]),
    st.sampled_from(["pin", "product"]),
    st.sampled_from(["e1", "e2"]),
    st.sampled_from(["click", "long_click", "save", "checkout"]),
)
