"""Dates and times as instants: microseconds since 1970 in UTC; without a zone a time is UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import polars as pl

_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_CLOCK = (
    r"[Tt ](?P<hour>[01][0-9]|2[0-3]):(?P<minute>[0-5][0-9])"
    r"(?::(?P<second>[0-5][0-9])(?:[.,](?P<fraction>[0-9]{1,9}))?)?"
    r"(?: ?[Zz]|(?P<sign>[+-])(?P<east>[01][0-9]|2[0-3])(?::?(?P<east_minute>[0-5][0-9]))?)?"
)
_VALUE = rf"(?P<day>{_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01]))(?:{_CLOCK})?"
_LITERAL = re.compile(_VALUE)
_MONTH = re.compile(rf"(?P<year>{_YEAR})(?:-(?P<month>0[1-9]|1[0-2]))?")
_DATE = rf"{_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = r"[+-](?:[01][0-9]|2[0-3]):[0-5][0-9]"
_COMMON_FORMS = (
    (f"^{_DATE}$", "%Y-%m-%d"),
    (f"^{_DATE}{_TIME}$", "%Y-%m-%dT%H:%M:%S%.f"),
    (f"^{_DATE}{_TIME}{_ZONE}$", "%Y-%m-%dT%H:%M:%S%.f%:z"),
)
_MICROSECONDS = 1_000_000
_DAY = 86_400 * _MICROSECONDS
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Period(NamedTuple):
    """The instants that a literal stands for, ``low`` to below ``high``, microseconds since 1970.

    A time is one of them; a date without a time is its whole day, in UTC.
    """

    low: int
    high: int


def period_of(text: str) -> Period | None:
    """Return the instants that a date or time in ISO 8601 stands for; None: it is none.

    A month (``2024-05``) and a year are periods, too.
    """
    match = _LITERAL.fullmatch(text)
    if match is None:
        return _month_or_year(text)
    try:
        day = datetime.fromisoformat(match["day"]).replace(tzinfo=UTC)
    except ValueError:  # the 30th of February
        return None
    low = _since_epoch(day)
    if match["hour"] is None:
        return Period(low, low + _DAY)
    seconds = 3600 * int(match["hour"]) + 60 * int(match["minute"]) + int(match["second"] or 0)
    low += seconds * _MICROSECONDS + int((match["fraction"] or "").ljust(6, "0")[:6])
    if match["sign"]:
        east = 3600 * int(match["east"]) + 60 * int(match["east_minute"] or 0)
        low -= (east if match["sign"] == "+" else -east) * _MICROSECONDS
    return Period(low, low + 1)


def is_time(text: str) -> bool:
    """Return whether a text is a date or time, which months and years are not."""
    return _LITERAL.fullmatch(text) is not None and period_of(text) is not None


def _month_or_year(text: str) -> Period | None:
    match = _MONTH.fullmatch(text)
    if match is None:
        return None
    year, month = int(match["year"]), int(match["month"] or 1)
    months = 12 if match["month"] is None else 1
    low = _since_epoch(datetime(year, month, 1, tzinfo=UTC))
    last = divmod(month - 1 + months, 12)
    if year + last[0] > 9999:
        return Period(low, _since_epoch(datetime(9999, 12, 31, tzinfo=UTC)) + _DAY)
    return Period(low, _since_epoch(datetime(year + last[0], last[1] + 1, 1, tzinfo=UTC)))


def _since_epoch(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def instants_of(texts: pl.Series) -> pl.Series:
    """Return the instants of texts, int64; null where a text is no date or time in ISO 8601.

    A date without a time is its first moment.
    """
    texts = texts.cast(pl.String)
    for form, layout in _COMMON_FORMS:
        # Texts that all are of one form, as columns of times are written, take a tenth of the time
        if bool(texts.str.contains(form).all()):
            times = texts.str.to_datetime(layout, time_unit="us", strict=False)
            return times.dt.replace_time_zone(None).cast(pl.Int64)
    return _instants_of_any(texts)


def _instants_of_any(texts: pl.Series) -> pl.Series:
    parts = (
        texts.alias("text")
        .to_frame()
        .select(pl.col("text").str.extract_groups(f"^(?:{_VALUE})$"))
        .unnest("text")
    )

    def number(name: str) -> pl.Expr:
        return pl.col(name).cast(pl.Int64, strict=False).fill_null(0)

    # Null where there is no such day, which makes the sum null
    day = pl.col("day").str.to_date("%Y-%m-%d", strict=False).cast(pl.Int32).cast(pl.Int64)
    east = 3600 * number("east") + 60 * number("east_minute")
    zone = pl.when(pl.col("sign") == "-").then(-east).otherwise(east)
    seconds = 3600 * number("hour") + 60 * number("minute") + number("second") - zone
    fraction = pl.col("fraction").fill_null("").str.pad_end(6, "0").str.slice(0, 6)
    return parts.select(
        (day * _DAY + seconds * _MICROSECONDS + fraction.cast(pl.Int64)).alias(texts.name)
    ).to_series()


def are_times(texts: pl.Series) -> bool:
    """Return whether there is a text and every text is a date or time in ISO 8601."""
    filled = texts.is_not_null()
    first = filled.arg_max()
    if first is None or not filled[first] or _LITERAL.fullmatch(texts[first]) is None:
        return False
    return instants_of(texts).null_count() == texts.null_count()
