"""One entity type's searchable index: ANN base, attributes, hidden rows and live entries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import polars as pl

from index_builder.ann import AnnIndex
from index_builder.errors import DimensionMismatch, InvalidQuery
from index_builder.filters.attributes import rows_of
from index_builder.filters.cache import SelectionCache
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.search.calibration import Calibration, CurvePoint, calibrate
from index_builder.search.construction import CalibrationQueries, build_parts
from index_builder.search.ef_choice import FilterSettings, PlainSettings, SearchSettings
from index_builder.search.filter_calibration import FAMILIES
from index_builder.search.index_config import IndexConfig
from index_builder.search.index_files import (
    INDEX_FILE,
    INDEX_FORMAT,
    IndexParts,
    IndexRecord,
    load_ann,
)
from index_builder.search.live_merge import LiveConditions, merge_live, merge_plain
from index_builder.search.plans import AllowedRows, BaseHits, BaseSearch
from index_builder.search.request import (
    MAX_K,
    OPTION_NAMES,
    SearchOptions,
    SearchResult,
)
from index_builder.storage.corpus import Corpus, check_vectors, unit_vector

if TYPE_CHECKING:
    from index_builder.search.live_segments import LiveSegment, LiveView

__all__ = [
    "INDEX_FILE",
    "INDEX_FORMAT",
    "MAX_K",
    "CalibrationQueries",
    "EntityIndex",
    "IndexConfig",
    "SearchOptions",
    "SearchResult",
]


_UNIT_ERROR = 1e-6
"""Queries whose squared norm is nearer to 1 are searched as they are."""
SCORE_ERROR = 2e-6
"""What rounding may change in a score."""
_EXACT = PlainSettings(0, 1.0, 0, 1.0, 1.0, must_reach=True)
_ALL_ROWS = AllowedRows()


class _Conditions(NamedTuple):
    """What answers have to meet."""

    filter: str | None
    exclude_ids: Collection[str]
    live: LiveView | None


class EntityIndex:
    """An immutable base and a reference to live entries, which ``set_live`` swaps whole.

    Searches take no lock.

    Attributes:
        token: Stands for this index where the index itself would keep a retired release in memory.
        version: Stands for this index with its current live entries; while it is the same object,
            answers are the same.
        lexical: Words of the base rows' texts; None where there were none.
    """

    def __init__(self, parts: IndexParts, record: IndexRecord) -> None:
        self.entity_type = record.entity_type
        self.token = object()
        self.version = object()
        self.ids = parts.ids
        self.corpus = parts.corpus
        self.ann = parts.ann
        self.attribute_table = parts.attributes
        self.attribute_table.row_of = parts.ids.row_of
        self.lexical = parts.lexical
        self._parts = parts
        self._record = record
        self._live: LiveView | None = None
        self._base = BaseSearch(parts)
        self._selections = SelectionCache(parts.attributes)
        self._settings = self._choose_settings()
        self._shape_1 = (self.dimension,)
        self._shape_2 = (1, self.dimension)

    # ---- build, save, load -----------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        entity_type: str,
        ids: Sequence[str],
        vectors: np.ndarray,
        attributes: pl.DataFrame | None = None,
        config: IndexConfig | None = None,
        *,
        calibration_queries: CalibrationQueries | np.ndarray | None = None,
        lexical: LexicalIndex | None = None,
    ) -> EntityIndex:
        """Check, deduplicate, build and (given queries) calibrate.

        Args:
            entity_type: ``pin``, ``product``, ``query`` or ``ad``.
            ids: One per row, unique, non-empty, NFC.
            vectors: float32 ``(N, D)``, finite unit rows.
            attributes: One row per id, or None.
            config: How to build; ``auto`` by default.
            calibration_queries: Real ones as float32 ``(Q, D)``, or with their source; None: not
                calibrated.
            lexical: Words of the rows' texts, or None.

        Raises:
            IndexBuildError: A bad or repeated id, or an impossible attribute; names the row.
            InvalidVectors: A row that may not enter an index.
            UnsupportedCpu: This CPU cannot run the requested kind.
        """
        config = config or IndexConfig()
        queries = calibration_queries
        if isinstance(queries, np.ndarray):
            queries = CalibrationQueries(queries)
        racing = None if queries is None else queries.vectors
        parts, facts = build_parts(ids, vectors, attributes, config, racing)
        if lexical is not None:
            parts = replace(parts, lexical=lexical)
            facts = {**facts, "lexical": lexical.describe()}
        record = IndexRecord(
            entity_type=entity_type, default_recall=config.default_recall, facts=facts
        )
        index = cls(parts, record)
        if queries is not None and len(parts.ids):
            index.calibrate(*queries)
        return index

    def calibrate(self, queries: np.ndarray, source: str) -> Calibration:
        """Measure recall and latency, plain and under filters, and keep the result.

        Args:
            queries: float32 ``(Q, D)``, unit rows.
            source: ``real queries`` or ``perturbed entities``.
        """
        queries = check_vectors(np.ascontiguousarray(queries), None, self.dimension)
        calibration = self._measure(queries, source)
        self._record = replace(self._record, calibration=calibration)
        self._settings = self._choose_settings()
        return calibration

    def _measure(self, queries: np.ndarray, source: str) -> Calibration:
        vectors = self.corpus.vectors
        if self.ann.exact:
            curve = (CurvePoint(10, 1.0, 1.0, 1.0),)
            return Calibration(len(queries), source, min(10, len(vectors)), curve)

        def search(query: np.ndarray, k: int, ef: int) -> np.ndarray:
            return self.ann.search(query, k, ef)[0]

        calibration = calibrate(search, vectors, queries, source=source)
        curves = self._base.measure_filters(queries)
        return replace(
            calibration,
            families=FAMILIES,
            sketch_points=curves.sketch,
            filtered_points=curves.graph,
            hidden_points=curves.hidden,
        )

    def _choose_settings(self) -> SearchSettings:
        exact, nodes = self.ann.exact, len(self.corpus.vectors)
        return SearchSettings(self.calibration, self.default_recall, nodes, exact)

    def save(self, folder: Path) -> None:
        """Write all files of the index; the same index gives the same bytes.

        They are ``index.*``, ``ids.*``, ``vectors.*``, ``attributes.parquet`` and ``lexical.*``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._parts.save(folder)
        self._record.write(folder)

    @classmethod
    def load(cls, folder: Path, *, graph: AnnIndex | None = None) -> EntityIndex:
        """Open what ``save`` wrote; the caller has checked sizes and checksums.

        Vectors and ids are memory-mapped.

        Args:
            folder: One entity type of a release.
            graph: The ANN index of this very folder if it is in memory already (``load_graph``,
                before a fork); None: loaded.

        Raises:
            IndexFormatError: Files are missing, damaged or of another format version.
            UnsupportedCpu: This CPU cannot run the index.
        """
        record = IndexRecord.read(folder)
        return cls(IndexParts.load(folder, record, graph), record)

    @staticmethod
    def load_graph(folder: Path) -> AnnIndex:
        """Load the ANN index of a checked folder and nothing else.

        Starts no threads, so a process may fork afterwards and share its memory; attributes
        (polars) cannot be read before a fork. Raises as ``load``.
        """
        return load_ann(folder, IndexRecord.read(folder), Corpus.load(folder))

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Rows of the base that are not hidden, plus living live entries."""
        rows, live = len(self.ids), self._live
        return rows if live is None else rows - live.hidden_count + live.live_count

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.corpus.vectors.shape[1])

    @property
    def kind(self) -> str:
        """Kind of the base index."""
        return self.ann.kind

    @property
    def calibration(self) -> Calibration | None:
        """What was measured; None where nothing was."""
        return self._record.calibration

    @property
    def default_recall(self) -> float:
        """ANN recall@10 that searches aim at when they do not say."""
        return self._record.default_recall

    def describe(self) -> dict[str, Any]:
        """Return the facts for the manifest, without times."""
        return dict(self._record.facts)

    def row_of(self, id_: str) -> int | None:
        """Return the base row of an id, hidden or not, or None."""
        return self.ids.row_of(id_)

    def base_vectors(self) -> np.ndarray:
        """Return float32 ``(N, D)``, one row per base id (a copy where duplicates share nodes)."""
        nodes = self.corpus.node_of_row
        return self.corpus.vectors if nodes is None else np.asarray(self.corpus.vectors[nodes])

    def row_vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of base rows, float32 ``(R, D)``."""
        nodes = self.corpus.node_of_row
        return np.asarray(self.corpus.vectors[rows if nodes is None else nodes[rows]])

    def allowed_rows(
        self, expression: str | None, exclude_ids: Collection[str] = ()
    ) -> np.ndarray | None:
        """Return which base rows pass a filter and are not excluded, bool ``(N,)``; None: all.

        Raises:
            FilterError: The filter does not parse or does not fit the attributes.
        """
        mask = None if expression is None else self._selections.get(expression).as_mask()
        excluded = [row for row in map(self.ids.row_of, exclude_ids) if row is not None]
        if excluded:
            mask = np.ones(len(self.ids), np.bool_) if mask is None else mask.copy()
            mask[excluded] = False
        return mask

    def vector(self, id_: str) -> np.ndarray | None:
        """Return the current vector of an id, live first; None if it is unknown or deleted."""
        live = self._live
        place = None if live is None else live.find(id_)
        if place is not None:
            segment, live_row = place
            return np.asarray(segment.vectors[live_row])
        row = self.ids.row_of(id_)
        if row is None or (live is not None and live.hides(row)):
            return None
        nodes = self.corpus.node_of_row
        return np.asarray(self.corpus.vectors[row if nodes is None else nodes[row]])

    def attributes(self, ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return attribute values of ids, in order.

        An unknown or deleted id and an unknown attribute give nothing; a repeated name comes once.
        """
        live = self._live
        names = list(dict.fromkeys(names))
        result: list[dict[str, Any]] = [{} for _ in ids]
        base: list[tuple[int, int]] = []
        # One look-up per segment: reading a table costs much more than reading a row of it
        by_segment: dict[int, tuple[LiveSegment, list[tuple[int, int]]]] = {}
        for i, id_ in enumerate(ids):
            place = live.find(id_) if live is not None else None
            if place is not None:
                segment, live_row = place
                by_segment.setdefault(id(segment), (segment, []))[1].append((i, live_row))
                continue
            row = self.ids.row_of(id_)
            if row is not None and not (live is not None and live.hides(row)):
                base.append((i, row))
        found = self.attribute_table.values([row for _, row in base], names)
        for (i, _), values in zip(base, found):
            result[i] = values
        for segment, places in by_segment.values():
            frame = segment.attributes
            known = [name for name in names if name in frame.columns]
            if known:
                rows = rows_of(frame, [live_row for _, live_row in places], known)
                for (i, _), values in zip(places, rows):
                    result[i] = values
        return result

    def attribute_types(self, names: Iterable[str]) -> dict[str, str]:
        """Return types by name of what the base has, and among ``names`` of what came live since.

        Live entries are looked at only where the base has no such name.
        """
        types: dict[str, str] = dict(self.attribute_table.schema)
        unknown = set(names) - types.keys()
        if unknown and self._live is not None:
            found = self._live.attribute_types()
            types.update((name, found[name]) for name in unknown & found.keys())
        return types

    @property
    def live(self) -> LiveView | None:
        """The live entries that a search sees now."""
        return self._live

    def set_live(self, view: LiveView | None) -> None:
        """Replace the live entries; searches that began before keep the old ones."""
        if view is not self._live:
            self._live = view
            # After the entries: who reads this version searches these entries, or later ones
            self.version = object()

    def forget_filters(self) -> None:
        """Drop cached filter results (benchmarks measure each filter afresh)."""
        self._selections = SelectionCache(self.attribute_table)

    # ---- search ----------------------------------------------------------------------------------

    def search(
        self, query: np.ndarray, k: int = 10, **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """Find the k best entities for one query.

        Args:
            query: float32 ``(D,)`` or ``(1, D)``, unit norm; a slightly other norm is corrected.
            k: 1 to 10,000; fewer come back only when fewer entities match.
            options: See ``SearchOptions``: ef, min_recall, filter, exclude_ids, min_score, exact,
                live.

        Raises:
            InvalidQuery: k, ef or min_recall out of range, or a query with NaN or another norm than
                1.
            DimensionMismatch: Another dimension or dtype.
            FilterError: The filter does not parse or does not fit the attributes.
        """
        query = self._checked(query, k)
        if options:
            return self._search_with(query, k, options)
        settings = self._settings.choose(k, None, None)
        if settings.ef == 0:
            return self._search_with(query, k, {"exact": True})
        hits = self._plain(query, k, settings, self._live)
        return SearchResult(hits.ids, hits.scores, hits.plan, hits.ef, hits.recall, None)

    def search_batch(
        self, queries: np.ndarray, k: int = 10, **options: Unpack[SearchOptions]
    ) -> list[SearchResult]:
        """Search for each row of ``queries`` float32 ``(B, D)``, as ``search`` does.

        Plain searches of a graph share one call of its library.
        """
        if queries.ndim != 2:
            raise DimensionMismatch(self.dimension, f"a batch of shape {queries.shape}")
        if len(queries) == 0:
            return []
        settings = None if options else self._settings.choose(k, None, None)
        if settings is None or settings.ef == 0:
            return [self.search(query, k, **options) for query in queries]
        queries = np.concatenate([self._checked(query, k) for query in queries])
        live = self._live
        found = self._base.nearest_batch(queries, k, settings, _not_hidden(live))
        results = []
        for i, hits in enumerate(found):
            hits = self._plain(queries[i : i + 1], k, settings, live, hits)
            results.append(
                SearchResult(hits.ids, hits.scores, hits.plan, hits.ef, hits.recall, None)
            )
        return results

    def _checked(self, query: np.ndarray, k: int) -> np.ndarray:
        """Return the query as a C-contiguous ``(1, D)`` of unit norm.

        What no search can answer is refused.
        """
        shape = getattr(query, "shape", None)
        if shape == self._shape_1:
            flat, query = query, query.reshape(1, -1)
        elif shape == self._shape_2:
            flat = query[0]
        else:
            got = f"shape {shape}" if shape is not None else type(query).__name__
            raise DimensionMismatch(self.dimension, got)
        if query.dtype != np.float32:
            raise DimensionMismatch(self.dimension, f"dtype {query.dtype}")
        norm2 = flat.dot(flat)
        if not 0.99 < norm2 < 1.01:
            what = "NaN or Inf" if not np.isfinite(norm2) else f"norm {float(norm2) ** 0.5:.4f}"
            raise InvalidQuery(
                f"a query must be a finite vector of norm 1, but got {what}. Normalise it, or check"
                " what was encoded."
            )
        if not 1 <= k <= MAX_K:
            raise InvalidQuery(f"k must be between 1 and {MAX_K:,}, but got {k}.")
        if not -_UNIT_ERROR < norm2 - 1 < _UNIT_ERROR:
            query = unit_vector(flat)[None]
        return query if query.flags.c_contiguous else np.ascontiguousarray(query)

    def _search_with(self, query: np.ndarray, k: int, options: SearchOptions) -> SearchResult:
        """Answer a checked query that asks for more than its k best."""
        for name in options:
            if name not in OPTION_NAMES:
                known = ", ".join(sorted(OPTION_NAMES))
                raise TypeError(f"search() expected options among {known}, but got {name!r}")
        wanted = (k, options.get("ef"), options.get("min_recall"))
        settings = self._settings.choose(*wanted)
        live = options.get("live", ...)
        if live is ...:
            live = self._live
        expression = options.get("filter")
        exclude_ids = options.get("exclude_ids", ())
        selectivity = None
        if options.get("exact"):
            settings = _EXACT
        if settings.ef and expression is None and not exclude_ids:
            hits = self._plain(query, k, settings, live)
        else:
            plans = None
            if settings is not _EXACT and expression is not None and not self.ann.exact:
                plans = self._settings.filtered(*wanted)
            conditions = _Conditions(expression, exclude_ids, live)
            hits, selectivity = self._full(query, k, settings, plans, conditions)
        min_score = options.get("min_score")
        if min_score is not None:
            hits = _at_least(hits, min_score)
        return SearchResult(hits.ids, hits.scores, hits.plan, hits.ef, hits.recall, selectivity)

    def _plain(
        self,
        query: np.ndarray,
        k: int,
        settings: PlainSettings,
        live: LiveView | None,
        hits: BaseHits | None = None,
    ) -> BaseHits:
        """Answer without filter and exclusions; ``hits``: the base's answer where it is known."""
        allowed = _not_hidden(live)
        if hits is None:
            hits = self._base.nearest(query, k, settings, allowed)
        if len(hits.ids) < k and hits.plan == "graph":
            # The graph leads to fewer: look wider, at last everywhere
            wide = FilterSettings(graph_ef=settings.ef, graph_recall=hits.recall)
            hits = self._base.search(query, k, allowed, wide)
        if live is None:
            return hits
        return merge_plain(query, k, hits, live.segments, settings.exact_live)

    def _full(
        self,
        query: np.ndarray,
        k: int,
        settings: PlainSettings,
        plans: FilterSettings | None,
        conditions: _Conditions,
    ) -> tuple[BaseHits, float | None]:
        """Answer any mix of filter, exclusions, hidden rows and live entries.

        Args:
            query: float32 ``(1, D)``, unit norm.
            k: Wanted.
            settings: Without a filter; ef 0 scans exactly.
            plans: Under the filter; None where every row has to be scored.
            conditions: What answers have to meet.

        Returns:
            The hits, and the share of base rows that pass the filter.
        """
        expression, exclude_ids, live = conditions
        selection = selectivity = None
        if expression is not None:
            selection = self._selections.get(expression)
            selectivity = selection.count / max(1, len(self.ids))
        _, hidden, hidden_count = _not_hidden(live)
        excluded: list[int] = []
        if exclude_ids:
            excluded = [row for row in map(self.ids.row_of, exclude_ids) if row is not None]
        if len(excluded) > 2 * k + 100:  # many: cheaper to hide them than to fetch past them
            hidden = np.zeros(len(self.ids), dtype=np.bool_) if hidden is None else hidden.copy()
            hidden[excluded] = True
            hidden_count = int(np.count_nonzero(hidden))
            excluded = []
        allowed = AllowedRows(selection, hidden, hidden_count)
        fetch = k + len(excluded)
        if plans is not None:
            hits = self._base.search(query, fetch, allowed, plans)
        elif settings.ef == 0 or selection is not None:
            hits = self._base.exact(query, fetch, allowed)
        else:
            hits = self._base.nearest(query, fetch, _deeper(settings, fetch), allowed)
            if len(hits.ids) < fetch and hits.plan == "graph":
                wide = FilterSettings(graph_ef=settings.ef, graph_recall=hits.recall)
                hits = self._base.search(query, fetch, allowed, wide)
        if excluded:
            banned = set(exclude_ids)
            keep = [i for i, id_ in enumerate(hits.ids) if id_ not in banned][:k]
            hits = hits._replace(ids=[hits.ids[i] for i in keep], scores=hits.scores[keep])
        if live is not None and live.live_count:
            exact = settings.exact_live
            hits = merge_live(
                query,
                k,
                hits,
                live,
                LiveConditions(expression, exclude_ids, exact, self.attribute_table),
            )
        return hits, selectivity


def _not_hidden(live: LiveView | None) -> AllowedRows:
    """Return the base rows that live writes leave."""
    return _ALL_ROWS if live is None else AllowedRows(None, live.hidden_rows, live.hidden_count)


def _deeper(settings: PlainSettings, fetch: int) -> PlainSettings:
    """Return settings whose ef has room for so many answers."""
    if fetch <= settings.ef and (settings.hidden_ef == 0 or fetch <= settings.hidden_ef):
        return settings
    hidden_ef = settings.hidden_ef and max(settings.hidden_ef, fetch)
    return settings._replace(ef=max(settings.ef, fetch), hidden_ef=hidden_ef)


def _at_least(hits: BaseHits, min_score: float) -> BaseHits:
    """Keep the hits that score ``min_score``, up to the rounding of scores.

    A vector's product with itself may come out as 0.9999998: what is kept for being so close is
    given the score asked for.
    """
    keep = int(np.count_nonzero(hits.scores >= min_score - SCORE_ERROR))
    scores = np.maximum(hits.scores[:keep], np.float32(min(min_score, 1.0)))
    return hits._replace(ids=hits.ids[:keep], scores=scores)
