"""Search posting lists within a budget: the compiled part, or numpy with the same answers.

Scores are integers (a factor of the query's term times the posting's byte), so that their sums do
not depend on the order of addition: both parts, and every machine, give the same bits.

A search reads the lists of the rarest terms until the budget of postings is spent. The rows that
are best by then are completed: what they have of the other terms is looked up. Rows that only the
other terms would have led to can be missed; the answer says whether that is ruled out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from index_builder.errors import IndexFormatError
from index_builder.lexical.postings import Postings
from index_builder.native import Postings as CompiledPostings

BUDGET = 20_000
"""Postings that a search reads."""
OVERDRAFT = 8
"""How many budgets a search may read to find k rows."""
LOOK_UP_STEPS = 12
"""Postings that are read in the time in which one row is looked up in a list."""
COMPLETE = 400
"""Rows that a search completes."""
_NO_ROWS = np.zeros(0, np.uint32)


class ScanTerms(NamedTuple):
    """Terms of a query that have postings, the rarest first."""

    places: np.ndarray
    """uint32 ``(T,)``, places in ``Postings.keys``."""
    factors: np.ndarray
    """uint32 ``(T,)``, at least 1: what one unit of weight is worth; sums stay below 2**32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanRequest:
    """What a search of posting lists is to return, and how much it may read.

    Attributes:
        k: Rows wanted.
        also: uint32 ``(R,)``, rows to be scored beside, or None.
        allowed: bool ``(N,)``: only rows where it is True; None: all.
        hidden: bool ``(N,)``: never rows where it is True; None: none is hidden.
        budget: Postings to read before the rest is looked up; 0: all are read. Reading goes on,
            up to ``OVERDRAFT`` budgets, while fewer than k rows are found, and with lists that are
            read sooner than looked up in.
        complete: How many rows are completed, at least k.
    """

    k: int
    also: np.ndarray | None = None
    allowed: np.ndarray | None = None
    hidden: np.ndarray | None = None
    budget: int = BUDGET
    complete: int = COMPLETE


class Scanned(NamedTuple):
    """What a search of posting lists found."""

    rows: np.ndarray
    """uint32, best first, ties by row; only rows that share a term with the query."""
    scores: np.ndarray
    """uint32, one a row."""
    also: np.ndarray
    """uint32 ``(R,)``, scores of the rows asked for; 0 where no term or not allowed."""
    is_exact: bool
    """Whether these are proved to be the best of all rows."""


class PostingSearch(Protocol):
    """Searches the postings that it was made for."""

    def search(self, terms: ScanTerms, request: ScanRequest) -> Scanned:
        """Find the best rows."""


def posting_search(postings: Postings, *, compiled: bool = True) -> PostingSearch:
    """Check postings and return what searches them.

    Args:
        postings: Perhaps mapped from a file.
        compiled: Whether the compiled part is used where it was built.

    Raises:
        IndexFormatError: A row is out of range or out of order, or a list's best weight is wrong.
    """
    if compiled and CompiledPostings is not None:
        return CompiledSearch(postings)
    return NumpySearch(postings)


class CompiledSearch:
    """Searches postings by the compiled part, without the interpreter's lock."""

    def __init__(self, postings: Postings) -> None:
        try:
            self._postings = CompiledPostings(
                postings.offsets, postings.rows, postings.weights, postings.best, postings.count
            )
        except ValueError as error:
            raise IndexFormatError(f"{error}. Rebuild this release.") from error

    def search(self, terms: ScanTerms, request: ScanRequest) -> Scanned:
        """Find the best rows."""
        also = _NO_ROWS if request.also is None else request.also
        rows, scores = np.empty(request.k, np.uint32), np.empty(request.k, np.uint32)
        also_scores = np.zeros(len(also), np.uint32)
        found, is_exact = self._postings.search(
            terms.places,
            terms.factors,
            rows,
            scores,
            also,
            also_scores,
            request.allowed,
            request.hidden,
            request.budget,
            request.complete,
        )
        return Scanned(rows[:found], scores[:found], also_scores, is_exact)


class NumpySearch:
    """Searches postings where the compiled part was not built."""

    def __init__(self, postings: Postings) -> None:
        self._postings = postings
        rows, starts = postings.rows, postings.offsets[:-1]
        rising = np.ones(len(rows), np.bool_)
        rising[1:] = rows[1:] > rows[:-1]
        rising[starts] = True
        if len(rows) and (int(rows.max()) >= postings.count or not rising.all()):
            raise IndexFormatError("a row is out of range or order. Rebuild this release.")
        if len(rows) and not np.array_equal(
            np.maximum.reduceat(postings.weights, starts), postings.best
        ):
            raise IndexFormatError("a best weight is not the best. Rebuild this release.")

    def search(self, terms: ScanTerms, request: ScanRequest) -> Scanned:
        """Find the best rows."""
        sums = np.zeros(self._postings.count, np.uint64)
        usable = np.ones(len(sums), np.bool_) if request.allowed is None else request.allowed
        if request.hidden is not None:
            usable = usable & ~request.hidden
        read = self._read(terms, request, usable, sums)
        touched = np.flatnonzero(sums).astype(np.uint32)
        rest = ScanTerms(terms.places[read:], terms.factors[read:])
        if len(rest.places):
            best = touched[_best_first(touched, sums[touched])]
            complete = max(request.k, request.complete)
            candidates, left = best[:complete], best[complete:]
        else:
            candidates, left = touched, _NO_ROWS
        scores = sums[candidates] + self._looked_up(rest, candidates)
        order = _best_first(candidates, scores)[: request.k]
        rows, scores = candidates[order], scores[order]
        most_left = int(sums[left[0]]) if len(left) else 0
        bound = int((rest.factors * self._postings.best[rest.places].astype(np.uint64)).sum())
        is_exact = not len(rest.places) or (
            len(rows) == request.k and int(scores[-1]) > most_left + bound
        )
        also = _NO_ROWS if request.also is None else request.also
        also_scores = np.where(usable[also], sums[also] + self._looked_up(rest, also), 0)
        return Scanned(rows, scores.astype(np.uint32), also_scores.astype(np.uint32), is_exact)

    def _read(
        self, terms: ScanTerms, request: ScanRequest, usable: np.ndarray, sums: np.ndarray
    ) -> int:
        """Add whole lists to ``sums``; return how many terms were read."""
        total = found = 0
        for number, (place, factor) in enumerate(zip(terms.places, terms.factors, strict=True)):
            start, end = self._bounds(place)
            total += end - start
            limit = request.budget * (1 if found >= request.k else OVERDRAFT)
            is_long = end - start > LOOK_UP_STEPS * max(request.k, request.complete)
            if number and request.budget and total > limit and is_long:
                return number
            rows = self._postings.rows[start:end]
            keep = usable[rows]
            weights = self._postings.weights[start:end][keep].astype(np.uint64)
            rows = rows[keep]
            found += int(np.count_nonzero(sums[rows] == 0))
            sums[rows] += np.uint64(factor) * weights
        return len(terms.places)

    def _looked_up(self, terms: ScanTerms, rows: np.ndarray) -> np.ndarray:
        """Return what ``rows`` have of terms, uint64 ``(R,)``."""
        scores = np.zeros(len(rows), np.uint64)
        for place, factor in zip(terms.places, terms.factors, strict=True):
            start, end = self._bounds(place)
            listed = self._postings.rows[start:end]
            at = np.minimum(listed.searchsorted(rows), len(listed) - 1)
            weights = self._postings.weights[start:end][at].astype(np.uint64)
            scores += np.where(listed[at] == rows, np.uint64(factor) * weights, np.uint64(0))
        return scores

    def _bounds(self, place: np.integer) -> tuple[int, int]:
        return int(self._postings.offsets[place]), int(self._postings.offsets[place + 1])


def _best_first(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the order of rows by score, ties by row."""
    return np.lexsort((rows, -scores.astype(np.int64)))
