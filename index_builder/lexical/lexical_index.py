"""BM25 over the texts of one entity type: built, saved, loaded and searched."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encoders.errors import ConfigError
from encoders.text.hashing import UInt64
from index_builder.errors import IndexFormatError
from index_builder.lexical.counting import count_terms
from index_builder.lexical.postings import MAX_WEIGHT, Bm25, Postings
from index_builder.lexical.scan import ScanRequest, ScanTerms, posting_search
from index_builder.lexical.terms import MAX_QUERY_TERMS, TOKENISER, are_grams, query_terms

LEXICAL_FILE = "lexical.json"
LEXICAL_FORMAT = 1
_FACTOR_SCALE = 1_024
"""Factors of a query's terms are whole numbers of this part of an inverse document frequency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LexicalConfig:
    """How texts are scored; kept in ``lexical.json``.

    Attributes:
        bm25: Saturation and discount of length.
        gram_weight: What a character n-gram of a query counts beside a word, above 0.
        field_weights: Catalogue column -> what an occurrence in it counts; 1 where it is not named.
    """

    bm25: Bm25 = field(default_factory=Bm25)
    gram_weight: float = 0.3
    field_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {
            "k1": self.bm25.k1,
            "b": self.bm25.b,
            "gram_weight": self.gram_weight,
            **{f"weight of {name}": weight for name, weight in self.field_weights.items()},
        }
        for name, number in numbers.items():
            # Sums of a query stay below 2**32 (``scan.py``)
            most = {"b": 1.0, "gram_weight": 2.0}.get(name, 100.0)
            least = 0.0 if name == "b" else 0.001
            if not least <= number <= most:
                raise ConfigError(
                    f"LexicalConfig: {name} must be between {least} and {most}, but got {number}."
                )


class LexicalQuery(NamedTuple):
    """A query's distinct terms, weighed by the statistics of one index."""

    keys: UInt64
    """(T,) ascending."""
    factors: np.ndarray
    """uint32 ``(T,)``, 1 or more."""
    maximum: float
    """Bound of the score: as if one text held every term, and no other text any."""


class LexicalHits(NamedTuple):
    """Answers of one search, best first."""

    rows: np.ndarray
    """uint32, ties by row; only rows that share a term with the query."""
    scores: np.ndarray
    """float32, BM25 of each."""
    also: np.ndarray
    """float32 ``(R,)``, BM25 of the rows asked for; 0 where a row shares no term."""
    is_exact: bool
    """Whether these are proved to be the best of all rows."""


class LexicalIndex:
    """The texts of one entity type as posting lists; immutable, searched from many threads.

    Attributes:
        config: How texts are scored.
        postings: The lists.
        average_length: Terms of a text, on average; what short and long are measured by.
        fields: Catalogue columns that were indexed.
    """

    def __init__(
        self,
        postings: Postings,
        config: LexicalConfig,
        average_length: float,
        fields: Sequence[str] = (),
        *,
        compiled: bool = True,
    ) -> None:
        self.config = config
        self.postings = postings
        self.average_length = average_length
        self.fields = tuple(fields)
        self._search = posting_search(postings, compiled=compiled)

    @classmethod
    def build(
        cls,
        fields: Mapping[str, Sequence[str]],
        rows: int,
        config: LexicalConfig | None = None,
        *,
        compiled: bool = True,
    ) -> LexicalIndex:
        """Index texts.

        Args:
            fields: Catalogue column -> one text a row.
            rows: N.
            config: How texts are scored.
            compiled: Whether the compiled search is used where it was built.

        Raises:
            IndexBuildError: More postings than 32 bits can number.
        """
        config = config or LexicalConfig()
        found = count_terms(fields, config.field_weights, rows)
        postings = Postings.build(found, config.bm25, found.average_length)
        return cls(postings, config, found.average_length, list(fields), compiled=compiled)

    def segment(self, fields: Mapping[str, Sequence[str]], rows: int) -> LexicalIndex:
        """Index further texts by the statistics of this index.

        Queries of this index search both, and scores compare.
        """
        found = count_terms(fields, self.config.field_weights, rows)
        postings = Postings.build(found, self.config.bm25, self.average_length)
        return LexicalIndex(postings, self.config, self.average_length, list(fields))

    def updated(
        self, keep: np.ndarray, fields: Mapping[str, Sequence[str]], added: int
    ) -> LexicalIndex:
        """Return an index of the rows that stay and of further texts behind them.

        What short and long are stays as it is, so weights of rows that stay need no texts.

        Args:
            keep: bool ``(N,)``.
            fields: Texts of the added rows.
            added: How many rows are added.
        """
        fresh = self.segment(fields, added)
        postings = Postings.joined([self.postings, fresh.postings], [keep, None])
        names = [*self.fields, *(name for name in fresh.fields if name not in self.fields)]
        return LexicalIndex(postings, self.config, self.average_length, names)

    # ---- search ----------------------------------------------------------------------------------

    def query(self, text: str) -> LexicalQuery:
        """Split a query into terms and weigh them by how rare they are here."""
        keys = query_terms(text)
        places = self.postings.places(keys)
        frequencies = np.zeros(len(keys), np.int64)
        known = places >= 0
        frequencies[known] = self.postings.frequencies(places[known])
        weights = np.where(are_grams(keys), self.config.gram_weight, 1.0)
        rarities = np.log1p((self.postings.count - frequencies + 0.5) / (frequencies + 0.5))
        factors = np.maximum(np.rint(rarities * weights * _FACTOR_SCALE), 1).astype(np.uint32)
        rarest = math.log1p((self.postings.count + 0.5) / 0.5)
        maximum = float(weights.sum()) * rarest * (self.config.bm25.k1 + 1)
        return LexicalQuery(keys, factors, maximum)

    def search(self, query: LexicalQuery, request: ScanRequest) -> LexicalHits:
        """Find the texts that share most with a query.

        Args:
            query: Of this index, or of the one that this is a ``segment`` of.
            request: How many, which rows may come, how much may be read.
        """
        found = self._search.search(self._scan_terms(query), request)
        return LexicalHits(
            found.rows, self._scores(found.scores), self._scores(found.also), found.is_exact
        )

    def _scan_terms(self, query: LexicalQuery) -> ScanTerms:
        """Return the query's terms that have postings here, the rarest first."""
        places = self.postings.places(query.keys)
        known = np.flatnonzero(places >= 0)
        places = places[known]
        order = np.argsort(self.postings.frequencies(places), kind="stable")[:MAX_QUERY_TERMS]
        return ScanTerms(places[order].astype(np.uint32), query.factors[known[order]])

    def _scores(self, sums: np.ndarray) -> np.ndarray:
        unit = (self.config.bm25.k1 + 1) / (MAX_WEIGHT * _FACTOR_SCALE)
        return sums.astype(np.float32) * np.float32(unit)

    # ---- files -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        return {
            "tokeniser": TOKENISER,
            "unicode": unicodedata.unidata_version,
            "k1": self.config.bm25.k1,
            "b": self.config.bm25.b,
            "gram_weight": self.config.gram_weight,
            "field_weights": dict(self.config.field_weights),
            "fields": list(self.fields),
            "average_length": self.average_length,
            "rows": self.postings.count,
            "lengths": self.postings.lengths(),
        }

    def save(self, folder: Path) -> None:
        """Write ``lexical.json`` and the arrays; the same index gives the same bytes."""
        self.postings.save(folder)
        values = {"format": LEXICAL_FORMAT, **self.describe()}
        text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        (folder / LEXICAL_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, rows: int, *, compiled: bool = True) -> LexicalIndex:
        """Map what ``save`` wrote, checked so that no search reads past it.

        Args:
            folder: Of one entity type.
            rows: Rows of that entity type.
            compiled: Whether the compiled search is used where it was built.

        Raises:
            IndexFormatError: Files are missing, damaged, of another version, or do not fit.
        """
        where = f"{folder.name}/{LEXICAL_FILE}"
        try:
            values = json.loads((folder / LEXICAL_FILE).read_text(encoding="utf-8"))
            _check_version(values, where)
            config = LexicalConfig(
                bm25=Bm25(k1=float(values["k1"]), b=float(values["b"])),
                gram_weight=float(values["gram_weight"]),
                field_weights={
                    str(name): float(weight) for name, weight in values["field_weights"].items()
                },
            )
            average_length = float(values["average_length"])
            fields = [str(name) for name in values["fields"]]
            if int(values["rows"]) != rows or not 0 < average_length < math.inf:
                raise IndexFormatError(
                    f"{where}: expected the words of {rows} rows, but got {values['rows']} of"
                    f" {average_length} terms each. Rebuild this release."
                )
            postings = Postings.load(folder, values["lengths"], rows)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            ConfigError,
        ) as error:
            raise IndexFormatError(
                f"{where} cannot be read ({error!r}). Rebuild this release."
            ) from error
        return cls(postings, config, average_length, fields, compiled=compiled)


def _check_version(values: Mapping[str, Any], where: str) -> None:
    """Refuse a format or a tokeniser of another version.

    Raises:
        IndexFormatError: It differs.
    """
    expected = (LEXICAL_FORMAT, TOKENISER)
    got = (values["format"], values["tokeniser"])
    if got != expected:
        raise IndexFormatError(
            f"{where}: this version reads format and tokeniser {expected}, but got {got}. Upgrade,"
            " or rebuild this release."
        )
