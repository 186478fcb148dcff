"""One entity type's searchable index: a base ANN index, attributes, hidden rows and live entries behind one ``search``."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from encoders.errors import ConfigError
from index_builder.ann import AnnConfig, AnnIndex, build_index, choose_kind, load_index
from index_builder.ann.choice import KINDS
from index_builder.ann.graph_files import unreachable_nodes
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.old_kinds import current_kind
from index_builder.errors import DimensionMismatch, IndexFormatError, InvalidQuery
from index_builder.filters.attributes import AttributeTable
from index_builder.filters.cache import SelectionCache
from index_builder.filters.expression import parse_filter
from index_builder.filters.selection import BoundFilter, Selection
from index_builder.search.calibration import Calibration, CurvePoint, calibrate, calibrate_sketches
from index_builder.search.ef_choice import SearchSettings
from index_builder.search.graph_race import RACE_QUERIES, faster_of_graph
from index_builder.search.index_config import DEFAULT_RECALL, IndexConfig
from index_builder.search.plans import BaseHits, BaseSearch
from index_builder.storage.corpus import Corpus, check_vectors
from index_builder.storage.engine_arrays import EngineArrays
from index_builder.storage.id_table import IdTable

if TYPE_CHECKING:
    from index_builder.search.live_segments import LiveView

__all__ = ["INDEX_FILE", "INDEX_FORMAT", "MAX_K", "EntityIndex", "IndexConfig", "SearchResult"]

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
MAX_K = 10_000


@dataclass(slots=True)
class SearchResult:
    """Answers of one search, best first.

    Attributes:
        ids: Entity ids; fewer than k only when fewer entities match.
        scores: float32, their inner products with the query.
        plan: ``graph``, ``exact``, ``scan`` (all matching rows), ``sketch`` (all rows' sketches),
            ``filtered-graph`` or ``empty``.
        ef: Candidate-list size of the graph search; 0 where no graph was walked.
        estimated_recall: Expected ANN recall at k; 1.0 where the plan is exact, None where the
            index was never calibrated.
        selectivity: Share of base rows that pass the filter; None without a filter.
    """

    ids: list[str]
    scores: np.ndarray
    plan: str
    ef: int
    estimated_recall: float | None
    selectivity: float | None


class EntityIndex:
    """An immutable base plus a reference to live entries, swapped whole by ``set_live``; searches take no lock."""

    def __init__(
        self,
        entity_type: str,
        ids: IdTable,
        corpus: Corpus,
        ann: AnnIndex,
        attributes: AttributeTable,
        facts: dict[str, Any],
        calibration: Calibration | None,
        default_recall: float = DEFAULT_RECALL,
        store: EngineArrays | None = None,
    ) -> None:
        self.entity_type = entity_type
        # Stands for this index where holding the index itself would keep a retired release in
        # memory
        self.token = object()
        # Stands for this index with the live entries of now: while it is the same, answers are the
        # same
        self.version = object()
        self.ids = ids
        self.corpus = corpus
        self.ann = ann
        self.attribute_table = attributes
        self.calibration = calibration
        self.default_recall = default_recall
        self._facts = facts
        self._live: LiveView | None = None
        self._store = store
        self._base = BaseSearch(corpus, ann, ids, store)
        self._selections = SelectionCache(attributes)
        self._settings = SearchSettings(calibration, default_recall, len(corpus.vectors), ann.exact)
        self._shape_1, self._shape_2 = (self.dimension,), (1, self.dimension)

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
        calibration_queries: np.ndarray | None = None,
        calibration_source: str = "real queries",
    ) -> EntityIndex:
        """Check, deduplicate, build and (given queries) calibrate.

        Args:
            entity_type: ``pin``, ``product``, ``query`` or ``ad``.
            ids: One per row, unique, non-empty, NFC.
            vectors: float32 ``(N, D)``, finite unit rows.
            attributes: One row per id, or None.
            config: How to build; ``auto`` by default.
            calibration_queries: float32 ``(Q, D)``; at least 2,000 for a tight interval. None: not
                calibrated.
            calibration_source: ``real queries`` or ``perturbed entities``.

        Raises:
            IndexBuildError: A bad or repeated id, or an impossible attribute; names the row.
            InvalidVectors: A row that may not enter an index.
            UnsupportedCpu: This CPU cannot run the kind asked for.
        """
        config = config or IndexConfig()
        vectors = check_vectors(vectors, ids)
        table = IdTable.build(ids)
        attribute_table = (
            AttributeTable.empty(len(table))
            if attributes is None or not attributes.columns
            else AttributeTable(attributes)
        )
        if attribute_table.count != len(table):
            raise ConfigError(
                f"expected one row of attributes per id, but got {attribute_table.count} rows and"
                f" {len(table)} ids."
            )
        corpus = Corpus.build(vectors)
        parameters = replace(
            config.ann, reproducible=config.ann.reproducible or config.deterministic
        )
        kind, why, choice = config.kind, "asked for", None
        if len(corpus.vectors) == 0:
            kind, why = "exact", "there are no vectors"
        elif kind == "auto":
            choice = choose_kind(
                len(corpus.vectors),
                dimension=int(vectors.shape[1]),
                low_memory=config.low_memory,
                deterministic=parameters.reproducible,
            )
            kind, why = choice.kind, choice.why
            parameters = replace(parameters, sketched_links=choice.sketched_links)
        ann = build_index(kind, corpus.vectors, parameters)
        if (
            config.kind == "auto"
            and choice is not None
            and choice.rival
            and calibration_queries is not None
        ):
            queries = check_vectors(
                np.ascontiguousarray(calibration_queries[:RACE_QUERIES]),
                None,
                int(vectors.shape[1]),
            )
            ann, why = faster_of_graph(
                ann, corpus.vectors, queries, config.default_recall, parameters
            )
            kind = ann.kind
        links = ann.neighbours()
        facts = {
            "kind": kind,
            "parameters": ann.parameters(),
            "why": why,
            "cpu_features": list(KINDS[kind].cpu_features),
            "rows": len(table),
            "nodes": len(corpus.vectors),
            "duplicates": len(table) - len(corpus.vectors),
            "unreachable": 0 if ann.exact else None if links is None else unreachable_nodes(links),
            "dimension": int(vectors.shape[1]),
            "attributes": dict(attribute_table.schema),
            "codes": isinstance(ann, Int8GraphIndex)
            or bool(attribute_table.schema and not ann.exact),
        }
        store = ann.arrays if isinstance(ann, Int8GraphIndex) else None
        if attribute_table.schema and not ann.exact:
            store = (
                store.with_sketches(corpus.vectors)
                if store
                else EngineArrays.build(corpus.vectors, None, sketches=True)
            )
        index = cls(
            entity_type,
            table,
            corpus,
            ann,
            attribute_table,
            facts,
            None,
            config.default_recall,
            store,
        )
        if calibration_queries is not None and len(table):
            index.calibrate(calibration_queries, calibration_source)
        return index

    def calibrate(self, queries: np.ndarray, source: str) -> Calibration:
        """Measure recall and latency over ``queries`` float32 ``(Q, D)``, plain and under filters, and keep the result."""
        queries = check_vectors(np.ascontiguousarray(queries), None, self.dimension)
        vectors = self.corpus.vectors
        if self.ann.exact:
            self.calibration = Calibration(
                len(queries), source, min(10, len(vectors)), (CurvePoint(10, 1.0, 1.0, 1.0),)
            )
        else:
            self.calibration = calibrate(
                lambda q, k, ef: self.ann.search(q, k, ef)[0], vectors, queries, source=source
            )
            if self._base.sketches:
                points = calibrate_sketches(self._base.sketch_scores, self.base_vectors(), queries)
                self.calibration = replace(self.calibration, sketch_points=points)
        self._settings = SearchSettings(
            self.calibration, self.default_recall, len(vectors), self.ann.exact
        )
        return self.calibration

    def save(self, folder: Path) -> None:
        """Write ``index.*``, ``ids.*``, ``vectors.*`` and ``attributes.parquet``; the same index gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus.save(folder)
        self.ids.save(folder)
        self.ann.save(folder / "index")
        if self._store is not None:
            self._store.save(folder)
        self.attribute_table.save(folder / "attributes.parquet")
        meta = {
            "format": INDEX_FORMAT,
            "entity_type": self.entity_type,
            "default_recall": self.default_recall,
            "facts": self._facts,
            "calibration": self.calibration.as_dict(latencies=False) if self.calibration else None,
        }
        (folder / INDEX_FILE).write_text(
            json.dumps(meta, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )

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
        meta, kind, config = _read_meta(folder)
        facts = {**meta["facts"], "kind": kind}
        corpus, ids = Corpus.load(folder), IdTable.load(folder)
        if corpus.rows != len(ids):
            raise IndexFormatError(
                f"{folder.name} holds {len(ids)} ids and {corpus.rows} vectors. Rebuild this"
                " release."
            )
        try:
            attributes = AttributeTable.load(folder / "attributes.parquet", len(ids))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise IndexFormatError(
                f"{folder.name}/attributes.parquet cannot be read ({error}). Rebuild this release."
            ) from error
        ann = (
            graph
            if graph is not None
            else load_index(kind, folder / "index", corpus.vectors, config)
        )
        calibration = Calibration.from_dict(meta["calibration"]) if meta["calibration"] else None
        store = (
            ann.arrays
            if isinstance(ann, Int8GraphIndex)
            else (
                EngineArrays.load(folder, corpus.vectors)
                if facts.get("codes", facts.get("filtered_walks"))
                else None
            )
        )
        return cls(
            meta["entity_type"],
            ids,
            corpus,
            ann,
            attributes,
            facts,
            calibration,
            meta["default_recall"],
            store,
        )

    @staticmethod
    def load_graph(folder: Path) -> AnnIndex:
        """The ANN index of a checked folder and nothing else.

        Starts no threads, so a process may fork afterwards and share its memory; attributes
        (polars) cannot be read before a fork. Raises as ``load``.
        """
        _, kind, config = _read_meta(folder)
        return load_index(kind, folder / "index", Corpus.load(folder).vectors, config)

    # ---- facts -----------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Rows of the base that are not hidden, plus living live entries."""
        live = self._live
        return (
            len(self.ids) if live is None else len(self.ids) - live.hidden_count + live.live_count
        )

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.corpus.vectors.shape[1])

    @property
    def kind(self) -> str:
        """Kind of the base index."""
        return self.ann.kind

    def describe(self) -> dict[str, Any]:
        """Facts for the manifest, without times."""
        return dict(self._facts)

    def row_of(self, id_: str) -> int | None:
        """Base row of an id (whether hidden or not), or None."""
        return self.ids.row_of(id_)

    def base_vectors(self) -> np.ndarray:
        """float32 ``(N, D)``, one row per base id (a copy only when duplicates share nodes)."""
        corpus = self.corpus
        return (
            corpus.vectors
            if corpus.node_of_row is None
            else np.asarray(corpus.vectors[corpus.node_of_row])
        )

    def vector(self, id_: str) -> np.ndarray | None:
        """The current vector of an id, live entries first; None if it does not exist or was deleted."""
        live = self._live
        if live is not None:
            place = live.find(id_)
            if place is not None:
                return np.asarray(place[0].vectors[place[1]])
        row = self.ids.row_of(id_)
        if row is None or (
            live is not None and live.hidden_rows is not None and live.hidden_rows[row]
        ):
            return None
        corpus = self.corpus
        return np.asarray(
            corpus.vectors[row if corpus.node_of_row is None else corpus.node_of_row[row]]
        )

    def attributes(self, ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Attribute values of ids, in order; an unknown id or attribute gives nothing, and a name asked for twice comes once."""
        live, names = self._live, list(dict.fromkeys(names))
        result: list[dict[str, Any]] = [{} for _ in ids]
        base: list[tuple[int, int]] = []
        for i, id_ in enumerate(ids):
            place = live.find(id_) if live is not None else None
            if place is not None:
                frame = place[0].attributes
                known = [name for name in names if name in frame.columns]
                result[i] = frame.select(known).row(place[1], named=True) if known else {}
                continue
            row = self.ids.row_of(id_)
            if row is not None:
                base.append((i, row))
        for (i, _), values in zip(
            base, self.attribute_table.values([row for _, row in base], names)
        ):
            result[i] = values
        return result

    @property
    def live(self) -> LiveView | None:
        """The live entries that a search sees now."""
        return self._live

    def set_live(self, view: LiveView | None) -> None:
        """Replace the live entries; searches that began before keep the old ones."""
        if view is not self._live:
            self._live = view
            self.version = (
                object()
            )  # after the entries: who reads this version searches these entries, or later ones

    def forget_filters(self) -> None:
        """Drop cached filter results (benchmarks measure each filter afresh)."""
        self._selections = SelectionCache(self.attribute_table)

    # ---- search ----------------------------------------------------------------------------------

    def search(
        self,
        query: np.ndarray,
        k: int = 10,
        *,
        ef: int | None = None,
        min_recall: float | None = None,
        filter: str | None = None,
        exclude_ids: Collection[str] = (),
        min_score: float | None = None,
        exact: bool = False,
        live: LiveView | EllipsisType | None = ...,
    ) -> SearchResult:
        """The k best entities for one query.

        Args:
            query: float32 ``(D,)`` or ``(1, D)``, unit norm.
            k: 1 to 10,000; fewer come back only when fewer entities match.
            ef: Candidate-list size; chosen from the calibrated curve when not given.
            min_recall: Expected ANN recall to reach; an exact scan where the curve does not reach
                it.
            filter: An expression over attributes, see ``index_builder.filters.selection``.
            exclude_ids: Never return these.
            min_score: Return only scores at or above it.
            exact: Scan everything.
            live: Live entries of another moment (``self.live`` then) instead of those of now.

        Raises:
            InvalidQuery: k, ef or min_recall out of range, or a query with NaN or another norm than
                1.
            DimensionMismatch: Another dimension or dtype.
            FilterError: The filter does not parse or does not fit the attributes.
        """
        query = self._checked(query, k)
        ef_search, expected = self._settings.choose(k, ef, min_recall)
        if ef_search == 0:
            exact = True
        if live is ...:
            live = self._live
        if filter is None and not exclude_ids and not exact:
            hits, selectivity = self._plain(query, k, ef_search, live), None
        else:
            hits, selectivity = self._general(query, k, ef_search, filter, exclude_ids, exact, live)
        if min_score is not None:
            keep = int(np.count_nonzero(hits.scores >= min_score))
            hits = hits._replace(ids=hits.ids[:keep], scores=hits.scores[:keep])
        recall = hits.recall
        return SearchResult(
            hits.ids,
            hits.scores,
            hits.plan,
            hits.ef,
            expected if recall is None else recall,
            selectivity,
        )

    def search_batch(self, queries: np.ndarray, k: int = 10, **options: Any) -> list[SearchResult]:
        """``search`` for each row of ``queries`` float32 ``(B, D)``; plain searches of a graph share one call of its library."""
        if queries.ndim != 2:
            raise DimensionMismatch(self.dimension, f"a batch of shape {queries.shape}")
        if len(queries) == 0:
            return []
        queries = np.ascontiguousarray(queries)
        ef, expected = (0, None) if options else self._settings.choose(k, None, None)
        if ef == 0:
            return [self.search(queries[i], k, **options) for i in range(len(queries))]
        for query in queries:
            self._checked(query, k)
        live = self._live
        hidden, hidden_count = (None, 0) if live is None else (live.hidden_rows, live.hidden_count)
        found = self._base.nearest_batch(queries, k, ef, hidden, hidden_count)
        found = [self._plain(queries[i : i + 1], k, ef, live, hits) for i, hits in enumerate(found)]
        return [
            SearchResult(
                h.ids, h.scores, h.plan, h.ef, expected if h.recall is None else h.recall, None
            )
            for h in found
        ]

    def _checked(self, query: np.ndarray, k: int) -> np.ndarray:
        shape = getattr(query, "shape", None)
        if shape == self._shape_1:
            flat, query = query, query.reshape(1, -1)
        elif shape == self._shape_2:
            flat = query[0]
        else:
            raise DimensionMismatch(
                self.dimension, f"shape {shape}" if shape is not None else type(query).__name__
            )
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
        return query if query.flags.c_contiguous else np.ascontiguousarray(query)

    def _plain(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        live: LiveView | None,
        hits: BaseHits | None = None,
    ) -> BaseHits:
        """No filter and nothing excluded; ``hits``: what the base's graph answers, where it is known."""
        hidden, hidden_count = (None, 0) if live is None else (live.hidden_rows, live.hidden_count)
        if hits is None:
            hits = self._base.nearest(query, k, ef, hidden, hidden_count)
        if (
            len(hits.ids) < k and hits.recall is None
        ):  # the graph leads to fewer: look wider, at last everywhere
            hits = self._base.search(query, k, ef, 0, None, hidden, hidden_count, False)
        if live is None:
            return hits
        ids, scores = hits.ids, hits.scores
        for segment in live.segments:
            ids, scores = segment.merge(query, k, ids, scores)
        return _with_live(hits, ids, scores)

    def _general(
        self,
        query: np.ndarray,
        k: int,
        ef: int,
        expression: str | None,
        exclude_ids: Collection[str],
        exact: bool,
        live: LiveView | None,
    ) -> tuple[BaseHits, float | None]:
        """Any mix of filter, excluded ids, hidden rows, live entries and the exact plan."""
        selection = selectivity = None
        if expression is not None:
            selection = self._selections.get(expression)
            selectivity = selection.count / max(1, len(self.ids))
        hidden, hidden_count = (
            (live.hidden_rows, live.hidden_count)
            if live is not None and live.hidden_count
            else (None, 0)
        )
        excluded = (
            [row for row in map(self.ids.row_of, exclude_ids) if row is not None]
            if exclude_ids
            else []
        )
        if len(excluded) > 2 * k + 100:  # many: cheaper to hide them than to fetch past them
            hidden = np.zeros(len(self.ids), dtype=np.bool_) if hidden is None else hidden.copy()
            hidden[excluded] = True
            hidden_count, excluded = int(np.count_nonzero(hidden)), []
        wanted = self._settings.sketches(k, ef) if selection is not None else 0
        hits = self._base.search(
            query, k + len(excluded), ef, wanted, selection, hidden, hidden_count, exact
        )
        banned = set(exclude_ids)
        if excluded:
            keep = [i for i, id_ in enumerate(hits.ids) if id_ not in banned][:k]
            hits = hits._replace(ids=[hits.ids[i] for i in keep], scores=hits.scores[keep])
        if live is not None and live.live_count:
            hits = self._merge(query, k, hits, live, expression, exclude_ids, exact)
        return hits, selectivity

    def _merge(
        self,
        query: np.ndarray,
        k: int,
        hits: BaseHits,
        live: LiveView,
        expression: str | None = None,
        excluded: Collection[str] = (),
        exact: bool = False,
    ) -> BaseHits:
        """Merge base hits with the best of each live segment; live ids are hidden in the base, so that none comes twice."""
        ids, scores = hits.ids, hits.scores
        gone = (
            [place for place in map(live.find, excluded) if place is not None] if excluded else []
        )
        while True:
            for segment in live.segments:
                mask = (
                    None
                    if expression is None
                    else self._live_selection(segment, expression).as_mask()
                )
                dead = [row for other, row in gone if other is segment] if gone else ()
                if dead:
                    mask = np.ones(len(segment), np.bool_) if mask is None else mask.copy()
                    mask[dead] = False
                ids, scores = segment.merge(query, k, ids, scores, mask, exact)
            leaked = set(excluded).intersection(ids) if excluded else ()
            if not leaked:
                break
            # Deleted by a writer while this search goes on, and so not found above: hide them, too,
            # and merge again.
            gone += [place for place in map(live.search_for, leaked) if place is not None]
            ids, scores = hits.ids, hits.scores
        return _with_live(hits, ids, scores)

    def _live_selection(self, segment: Any, expression: str) -> Selection:
        table = AttributeTable.aligned(segment.attributes, self.attribute_table, len(segment))
        return BoundFilter(parse_filter(expression), table).select()


def _with_live(hits: BaseHits, ids: list[str], scores: np.ndarray) -> BaseHits:
    """The base's answer with what live segments made of its ids and scores."""
    if ids is hits.ids:
        return hits
    return BaseHits(
        ids, scores, hits.plan if hits.plan != "empty" else "live", hits.ef, hits.recall
    )


def _read_meta(folder: Path) -> tuple[dict[str, Any], str, AnnConfig]:
    """Read ``index.json``: all of it, the kind under its name of today, and the kind's settings.

    Raises:
        IndexFormatError: It is damaged or of another format version.
    """
    try:
        meta = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        version, facts = meta["format"], meta["facts"]
        kind, config = current_kind(facts["kind"], AnnConfig(**facts["parameters"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexFormatError(
            f"{folder.name}/{INDEX_FILE} cannot be read ({error!r}). Rebuild this release."
        ) from error
    if version != INDEX_FORMAT:
        raise IndexFormatError(
            f"{folder.name}/{INDEX_FILE} has format {version}, but this version reads"
            f" {INDEX_FORMAT}. Upgrade, or rebuild."
        )
    return meta, kind, config
