"""Define the tables: their columns, types, meaning and limits, for reading, checks and docs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

import polars as pl

from encoders.errors import ConfigError

ROW = "__row"
"""Column with a row's number in its file, from 1."""

MALFORMED = "__malformed"
"""Column that says why a row could not be read (rule, fix, value as in messages); else null."""

ENTITY_TYPES = ("pin", "product", "query", "ad")
"""The paper's entity types. ``query`` means related queries; any other name is a type like pins."""

_ENTITY_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Names of folders and of collections in other engines, and nothing that two spellings share."""
_TAKEN_NAMES = ("query_encoder", "entity_encoder", "forms", "unified", "entity_type")
"""Folders of bundles and releases beside those of entity types; a header that stands twice."""

ACTIONS = ("impression", "click", "long_click", "save", "add_to_cart", "checkout", "query_click")
"""What a log row can say happened, weakest first."""

MAX_ID_CHARACTERS = 1_024
MAX_QUERY_CHARACTERS = 2_000
MAX_TEXT_CHARACTERS = 100_000
"""A longer text field is a broken export (a page pasted into a title), not a description."""

EARLIEST_YEAR = 1995
"""Timestamps before this year are unit mistakes (seconds read as milliseconds), not events."""


class Kind(StrEnum):
    """What the values of a column are; decides the dtype, the parsing and the checks."""

    ID = "id"
    TEXT = "text"
    CHOICE = "choice"
    NAME = "name"
    TEXT_LIST = "list of text"
    VECTOR = "vector"
    INTEGER = "integer"
    NUMBER = "number"
    TIMESTAMP = "timestamp (UTC)"


DTYPES: dict[Kind, pl.DataType] = {
    Kind.ID: pl.String(),
    Kind.TEXT: pl.String(),
    Kind.CHOICE: pl.String(),
    Kind.NAME: pl.String(),
    Kind.TEXT_LIST: pl.List(pl.String()),
    Kind.VECTOR: pl.List(pl.Float32()),
    Kind.INTEGER: pl.Int64(),
    Kind.NUMBER: pl.Float64(),
    Kind.TIMESTAMP: pl.Datetime("us", "UTC"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table."""

    name: str
    kind: Kind
    doc: str
    """What the value means, with its unit."""
    required: bool = False
    """The column must be there and no value may be null or blank."""
    default: str | int | None = None
    """Value that fills nulls and a column that is absent; None: both stay as they are."""
    choices: tuple[str, ...] = ()
    """Allowed values of a CHOICE column; usual ones of a NAME column."""
    minimum: float | None = None
    """Smallest allowed value of a number."""
    max_characters: int = MAX_TEXT_CHARACTERS
    """Longest allowed text (each element of a list)."""

    def other_value(self, value: str) -> str | None:
        """Return the choice that a value of another system may mean, or None."""
        return other_value(value, self.choices)

    @property
    def dtype(self) -> pl.DataType:
        """Return the Polars type of the column once read."""
        return DTYPES[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSchema:
    """One table: its columns, its key, and whether unknown columns are kept as attributes."""

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    """Columns that name a row; two rows with one key and different content are an error."""
    open: bool = False
    """Unknown columns are attributes, their texts checked; elsewhere they are kept unchecked."""

    def column(self, name: str) -> Column | None:
        """Return the column called ``name``, or None."""
        return next((c for c in self.columns if c.name == name), None)

    def empty(self) -> pl.DataFrame:
        """Return a table without rows that has every required and defaulted column, typed."""
        return pl.DataFrame(
            schema={c.name: c.dtype for c in self.columns if c.required or c.default is not None}
        )


def _id(name: str, doc: str, required: bool = True) -> Column:
    return Column(
        name=name, kind=Kind.ID, doc=doc, required=required, max_characters=MAX_ID_CHARACTERS
    )


def _text(name: str, doc: str) -> Column:
    return Column(name=name, kind=Kind.TEXT, doc=doc)


def _query(required: bool = True) -> Column:
    return Column(
        name="query",
        kind=Kind.TEXT,
        doc="What was typed.",
        required=required,
        max_characters=MAX_QUERY_CHARACTERS,
    )


_ENTITY_TYPE = Column(
    name="entity_type",
    kind=Kind.NAME,
    doc="Kind of entity, or a name of your own: lower-case letters, digits and `_`.",
    required=True,
    choices=ENTITY_TYPES,
)
_LANGUAGE = Column(
    name="language",
    kind=Kind.TEXT,
    doc="BCP 47 language of the query; empty: unknown.",
    default="",
    max_characters=64,
)
_COUNTRY = Column(
    name="country",
    kind=Kind.TEXT,
    doc="ISO 3166 country of the searcher; empty: unknown.",
    default="",
    max_characters=64,
)
_ACTION = Column(
    name="action", kind=Kind.CHOICE, doc="What the user did.", required=True, choices=ACTIONS
)
_COUNT = Column(name="count", kind=Kind.INTEGER, doc="How often.", default=1, minimum=0)

CATALOGUE = TableSchema(
    name="catalogue",
    doc=(
        "What can be retrieved: pins, products, ads, your own. Unknown columns are attributes (for"
        " filters and answers)."
    ),
    key=("entity_type", "id"),
    open=True,
    columns=(
        _id("id", "Unique within the entity type."),
        _ENTITY_TYPE,
        _text("title", "Title."),
        _text("description", "Description."),
        _text("caption", "Synthetic caption of the image."),
        Column(
            name="board_titles",
            kind=Kind.TEXT_LIST,
            doc="Titles of the boards the entity was saved to, best first.",
        ),
        Column(
            name="engaged_queries",
            kind=Kind.TEXT_LIST,
            doc="Queries that led to engagement, best first.",
        ),
        _text("domain", "Domain of the link."),
        _text("image", "Path or URL of the image."),
        _text("brand", "Brand."),
        _text("category", "Product type or category."),
        _text("color", "Colours."),
        _text("material", "Materials."),
        _text("pattern", "Patterns."),
        _text("size", "Sizes."),
        Column(name="pinsage", kind=Kind.VECTOR, doc="PinSage-like vector."),
        Column(name="itemsage", kind=Kind.VECTOR, doc="ItemSage-like vector."),
        Column(
            name="visual",
            kind=Kind.VECTOR,
            doc="Visual vector; a list of vectors where there are several images.",
        ),
    ),
)

QUERIES = TableSchema(
    name="queries",
    doc="Distinct queries with their frequency.",
    columns=(_query(), _LANGUAGE, _COUNTRY, _COUNT),
)

LOG = TableSchema(
    name="log",
    doc="One row per event of a search log.",
    columns=(
        Column(name="timestamp", kind=Kind.TIMESTAMP, doc="When it happened.", required=True),
        _query(),
        _LANGUAGE,
        _COUNTRY,
        Column(
            name="user_id",
            kind=Kind.ID,
            doc="Hashed id of the user; empty: unknown.",
            default="",
            max_characters=MAX_ID_CHARACTERS,
        ),
        _ENTITY_TYPE,
        _id("entity_id", "Id in the catalogue; for entity type query: the suggested query."),
        _ACTION,
        Column(
            name="dwell_seconds", kind=Kind.NUMBER, doc="Seconds spent after a click.", minimum=0
        ),
        Column(name="position", kind=Kind.INTEGER, doc="Rank in the results, from 1.", minimum=0),
    ),
)

BOARDS = TableSchema(
    name="boards",
    doc="Which entity was saved to which board.",
    columns=(
        _id("board_id", "Board."),
        Column(name="title", kind=Kind.TEXT, doc="Title of the board.", default=""),
        _id("entity_id", "Entity saved to the board."),
    ),
)

PAIRS = TableSchema(
    name="pairs",
    doc="Training and evaluation pairs.",
    columns=(
        _query(),
        _LANGUAGE,
        _COUNTRY,
        _ENTITY_TYPE,
        _id("entity_id", "The positive."),
        Column(
            name="action",
            kind=Kind.TEXT,
            doc="The action (or the kind of annotation instead).",
            default="",
            max_characters=64,
        ),
        _COUNT,
        Column(
            name="timestamp",
            kind=Kind.TIMESTAMP,
            doc="Last event of the pair; null for annotations.",
        ),
        Column(
            name="split",
            kind=Kind.CHOICE,
            doc="Part the pair belongs to.",
            default="train",
            choices=("train", "heldout", "dev", "test", "validation"),
        ),
    ),
)

JUDGEMENTS = TableSchema(
    name="judgements",
    doc="Graded relevance of an entity for a query.",
    columns=(
        _query(),
        _id("entity_id", "The judged entity."),
        Column(
            name="grade",
            kind=Kind.INTEGER,
            doc="0 irrelevant; higher is better.",
            required=True,
            minimum=0,
        ),
        _COUNTRY,
        Column(name="judge", kind=Kind.TEXT, doc="Who judged.", default="", max_characters=256),
    ),
)

LABELS = TableSchema(
    name="labels",
    doc="Place of a query in a taxonomy.",
    columns=(
        _query(),
        Column(name="path", kind=Kind.TEXT_LIST, doc="From the root down.", required=True),
    ),
)

SCHEMAS: dict[str, TableSchema] = {
    s.name: s for s in (CATALOGUE, QUERIES, LOG, BOARDS, PAIRS, JUDGEMENTS, LABELS)
}


def is_entity_type(name: str) -> bool:
    """Tell whether an entity type may have this name."""
    return bool(_ENTITY_TYPE_NAME.fullmatch(name)) and name not in _TAKEN_NAMES


def plain_entity_type(value: str) -> str | None:
    """Write a value as the name of an entity type, or return None: it has no letters for one."""
    plain = re.sub(r"[^a-z0-9]+", "_", value.strip().lower()).strip("_")
    return plain if is_entity_type(plain) else None


def schema(name: str) -> TableSchema:
    """Look a table's schema up by name.

    Raises:
        ConfigError: There is no such table.
    """
    if name not in SCHEMAS:
        raise ConfigError(f"unknown table {name!r}. Tables are: {', '.join(SCHEMAS)}.")
    return SCHEMAS[name]


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("sku", "item_id", "product_id", "pin_id", "ad_id", "asin", "uid", "key", "identifier"),
    "entity_type": ("type", "item_type", "object_type", "kind"),
    "title": ("headline", "name", "heading", "product_name", "product_title", "item_name", "label"),
    "description": (
        "summary",
        "body",
        "text",
        "content",
        "details",
        "long_description",
        "abstract",
    ),
    "image": ("image_url", "img", "picture", "thumbnail", "photo"),
    "domain": ("host", "site", "website"),
    "brand": ("manufacturer", "vendor", "maker"),
    "category": ("product_type", "department", "categories", "section"),
    "color": ("colour", "colors", "colours"),
    "timestamp": ("ts", "time", "date", "datetime", "created_at", "event_time", "event_timestamp"),
    "action": ("event", "event_type", "event_name", "interaction"),
    "user_id": ("uid", "user", "member_id", "visitor_id"),
    "query": ("q", "search", "search_term", "search_query"),
    "entity_id": ("item_id", "doc_id", "document_id", "product_id", "sku", "pin_id", "clicked_id"),
    "dwell_seconds": ("dwell", "dwell_time", "dwell_s"),
    "position": ("rank",),
    "language": ("lang", "locale"),
}
"""Names of the columns in other systems."""

OTHER_VALUES: dict[str, tuple[str, ...]] = {
    "impression": ("view", "show", "shown", "impressions", "display", "imp"),
    "click": ("clicked", "open", "tap", "select"),
    "long_click": ("longclick", "dwell", "read"),
    "save": ("pin", "repin", "like", "favorite", "favourite", "bookmark", "wishlist", "saved"),
    "add_to_cart": ("cart", "addtocart", "add-to-cart", "add_to_basket", "basket", "add_to_bag"),
    "checkout": ("buy", "purchase", "order", "transaction", "conversion", "bought", "paid"),
    "query_click": ("suggestion_click", "related_click"),
    "product": ("item", "sku", "article", "package", "offer"),
    "pin": ("image", "photo", "post"),
    "ad": ("advert", "advertisement", "promotion", "sponsored"),
}
"""Values of choices in other systems."""


def lookalikes(columns: Sequence[str], table: TableSchema) -> dict[str, str]:
    """Find columns of a file that may be absent columns of ``table`` under another name.

    Returns:
        Column of the file, spelt nearly like one of the table or of that name in other systems ->
        column of the table.
    """
    absent = [c.name for c in table.columns if c.name not in columns]
    found = {}
    for column in columns:
        folded = column.strip().lower()
        near = [name for name in absent if folded in OTHER_NAMES.get(name, ())]
        near = near or get_close_matches(folded, absent, n=1, cutoff=0.8)
        if near and table.column(column) is None:
            found[column] = near[0]
            absent.remove(near[0])
    return found


def other_value(value: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a value of another system may mean, or None."""
    folded = value.strip().lower().replace(" ", "_")
    if folded in choices:
        return folded
    known = (choice for choice in choices if folded in OTHER_VALUES.get(choice, ()))
    return next(known, None)


def renames(near: Mapping[str, str], wanted: Sequence[str]) -> str:
    """Word what ``lookalikes`` found for the wanted columns; empty if it found nothing.

    For example `` (rename 'ts' to 'timestamp', 'event' to 'action')``.
    """
    found = ", ".join(f"{name!r} to {known!r}" for name, known in near.items() if known in wanted)
    return f" (rename {found})" if found else ""


def could_be_log(columns: Sequence[str]) -> bool:
    """Tell whether a file with all columns of pairs may be a log instead.

    It may where it says when or what happened, and has no split or count.
    """
    events = {name for known in ("timestamp", "action") for name in (known, *OTHER_NAMES[known])}
    return not {"split", "count"} & set(columns) and any(
        column.strip().lower() in events for column in columns
    )


def guess_table(columns: list[str]) -> str | None:
    """Name the table whose required columns are all present; of several, the one that has most.

    None: none fits, or the columns fit pairs but may be a log's.
    """
    fits = {
        s.name: sum(c.required for c in s.columns)
        for s in SCHEMAS.values()
        if all(c.name in columns for c in s.columns if c.required)
    }
    if "pairs" in fits and "split" in columns:
        return "pairs"
    best = max(fits, key=lambda name: fits[name]) if fits else None
    return None if best == "pairs" and could_be_log(columns) else best
