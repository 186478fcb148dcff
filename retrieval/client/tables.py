"""Lay out answers as tables: HTML for notebooks, polars and pandas frames.

The HTML shows what a catalogue says and nothing more: every text is escaped, there are no scripts,
and pictures are ``<img>``, in which an SVG cannot run any.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from encoders.errors import MissingDependency

if TYPE_CHECKING:
    import pandas
    import polars

    from retrieval.client.results import FusedScore, Hit

PICTURES = ("image", "picture", "image_url", "thumbnail")
"""Attributes that may hold a picture, first one first: an address, or an SVG."""
TITLES = ("title", "name")
"""Attributes that may say what an entity is."""
MOST_CHARACTERS = 120
"""Of a value in HTML; the rest is cut off."""
_SCHEMES = ("https://", "http://", "data:image/")
_CELL = "text-align:left;vertical-align:middle"
_IMAGE = "height:48px;max-width:96px;object-fit:contain"


def rows_of(hits: Sequence[Hit], fused: Sequence[FusedScore] | None) -> list[dict[str, Any]]:
    """Lay out hits as one dictionary each: rank, id, scores, then the attributes.

    An attribute named as one of the first columns becomes ``attribute_<name>``.
    """
    rows = []
    for rank, hit in enumerate(hits, 1):
        row: dict[str, Any] = {"rank": rank, "id": hit.id, "score": hit.score}
        if fused is not None:
            scores = fused[rank - 1]
            row |= {"fused": scores.fused, "lexical": scores.lexical, "votes": scores.votes}
            row["probability"] = scores.probability
        taken = set(row)
        for name, value in hit.attributes.items():
            row[f"attribute_{name}" if name in taken else name] = value
        rows.append(row)
    return rows


def polars_frame(rows: Sequence[Mapping[str, Any]]) -> polars.DataFrame:
    """Make a polars frame of ``rows_of``.

    Raises:
        MissingDependency: polars is not installed.
    """
    try:
        import polars
    except ImportError as error:
        raise MissingDependency("polars", "notebook", "to_polars()") from error
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in columns or EMPTY}
    return polars.DataFrame(values, schema=None if rows else EMPTY, strict=False)


EMPTY = {"rank": int, "id": str, "score": float}
"""Columns of an answer without hits."""


def pandas_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Make a pandas frame of ``rows_of``.

    Raises:
        MissingDependency: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependency("pandas", "notebook", "to_pandas()") from error
    return pandas.DataFrame(list(rows)) if rows else pandas.DataFrame(columns=list(EMPTY))


def html_table(caption: str, hits: Sequence[Hit], fused: Sequence[FusedScore] | None) -> str:
    """Lay out hits as an HTML table with their pictures.

    Args:
        caption: Said above the table; plain text.
        hits: Best first.
        fused: Scores of a fused answer.
    """
    rows = rows_of(hits, fused)
    pictures = [_picture(hit) for hit in hits]
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in names if name not in PICTURES]
    first = ["rank", *(name for name in TITLES if name in shown), "id"]
    columns = [*first, *(name for name in shown if name not in first)]
    head = ["", *columns] if any(pictures) else columns
    body = ""
    for row, picture in zip(rows, pictures, strict=True):
        cells = [_text(row.get(name)) for name in columns]
        cells = [picture, *cells] if any(pictures) else cells
        body += f"<tr>{_cells('td', cells)}</tr>"
    return (
        f"<table><caption style='{_CELL}'>{escape(caption)}</caption>"
        f"<thead><tr>{_cells('th', map(escape, head))}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _cells(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag} style='{_CELL}'>{cell}</{tag}>" for cell in cells)


def _text(value: object) -> str:
    """Write a value, escaped and at most ``MOST_CHARACTERS`` long."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    cut = len(text) > MOST_CHARACTERS
    return escape(text[:MOST_CHARACTERS] + "…" if cut else text)


def _picture(hit: Hit) -> str:
    """Return the ``<img>`` of a hit, or an empty string."""
    for name in PICTURES:
        value = hit.attributes.get(name)
        if not isinstance(value, str):
            continue
        if value.lstrip().startswith("<svg"):
            value = f"data:image/svg+xml;base64,{base64.b64encode(value.encode()).decode()}"
        if value.startswith(_SCHEMES):
            title = next((hit.attributes[t] for t in TITLES if t in hit.attributes), hit.id)
            return (
                f'<img src="{escape(value)}" alt="{escape(str(title))}" loading="lazy"'
                f' referrerpolicy="no-referrer" style="{_IMAGE}">'
            )
    return ""
