"""An index on disk: its parts, what ``index.json`` says about them, how both are kept and read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from index_builder.ann import AnnConfig, AnnIndex, load_index
from index_builder.ann.int8_graph import Int8GraphIndex
from index_builder.ann.old_kinds import current_kind
from index_builder.errors import IndexFormatError
from index_builder.filters.attributes import AttributeTable
from index_builder.lexical.lexical_index import LEXICAL_FILE, LexicalIndex
from index_builder.search.calibration import Calibration
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import EngineArrays
from index_builder.storage.id_table import IdTable

INDEX_FILE = "index.json"
INDEX_FORMAT = 1
_ATTRIBUTES_FILE = "attributes.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexParts:
    """What an index is made of.

    Attributes:
        ids: One per row.
        attributes: One row per id.
        corpus: The distinct vectors, and which rows share them.
        ann: Over the distinct vectors.
        arrays: Codes and sketches for filtered searches and compiled walks; None: no such.
        lexical: Words of the rows' texts; None: there were no texts.
    """

    ids: IdTable
    attributes: AttributeTable
    corpus: Corpus
    ann: AnnIndex
    arrays: EngineArrays | None = None
    lexical: LexicalIndex | None = None

    def save(self, folder: Path) -> None:
        """Write ``index.*``, ``ids.*``, ``vectors.*``, ``attributes.parquet``, ``lexical.*``."""
        self.corpus.save(folder)
        self.ids.save(folder)
        self.ann.save(folder / "index")
        if self.arrays is not None:
            self.arrays.save(folder)
        if self.lexical is not None:
            self.lexical.save(folder)
        self.attributes.save(folder / _ATTRIBUTES_FILE)

    @classmethod
    def load(cls, folder: Path, record: IndexRecord, graph: AnnIndex | None) -> IndexParts:
        """Map or read what ``save`` wrote, but for ``graph`` where it is in memory already.

        Raises:
            IndexFormatError: Files are missing, damaged or do not fit each other.
            UnsupportedCpu: This CPU cannot run the index.
        """
        corpus = Corpus.load(folder)
        ids = IdTable.load(folder)
        if corpus.rows != len(ids):
            raise IndexFormatError(
                f"{folder.name} holds {len(ids)} ids and {corpus.rows} vectors. Rebuild this"
                " release."
            )
        try:
            attributes = AttributeTable.load(folder / _ATTRIBUTES_FILE, len(ids))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise IndexFormatError(
                f"{folder.name}/{_ATTRIBUTES_FILE} cannot be read ({error}). Rebuild this release."
            ) from error
        ann = load_ann(folder, record, corpus) if graph is None else graph
        arrays: EngineArrays | None = None
        if isinstance(ann, Int8GraphIndex):
            arrays = ann.arrays
        elif record.has_codes:
            arrays = EngineArrays.load(folder, corpus.vectors)
        lexical = None
        if (folder / LEXICAL_FILE).is_file():
            lexical = LexicalIndex.load(folder, len(ids))
        return cls(
            ids=ids,
            attributes=attributes,
            corpus=corpus,
            ann=ann,
            arrays=arrays,
            lexical=lexical,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRecord:
    """What ``index.json`` says.

    Attributes:
        entity_type: ``pin``, ``product``, ``query`` or ``ad``.
        default_recall: ANN recall@10 that searches aim at when they do not say.
        facts: Kind, parameters, reason of the choice, counts, attribute types: no times.
        calibration: None where nothing was measured.
    """

    entity_type: str
    default_recall: float
    facts: dict[str, Any]
    calibration: Calibration | None = None

    @property
    def kind(self) -> str:
        """Kind of the ANN index."""
        return str(self.facts["kind"])

    @property
    def has_codes(self) -> bool:
        """Whether codes and sketches lie beside the ANN index (early releases: filtered walks)."""
        return bool(self.facts.get("codes", self.facts.get("filtered_walks")))

    def write(self, folder: Path) -> None:
        """Write ``index.json``; the same record gives the same bytes."""
        calibration = self.calibration
        values = {
            "format": INDEX_FORMAT,
            "entity_type": self.entity_type,
            "default_recall": self.default_recall,
            "facts": self.facts,
            "calibration": None if calibration is None else calibration.as_dict(latencies=False),
        }
        text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> IndexRecord:
        """Read ``index.json``; kinds have their current names.

        Raises:
            IndexFormatError: It is damaged or of another format version.
        """
        try:
            values = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            if values["format"] != INDEX_FORMAT:
                raise IndexFormatError(
                    f"{folder.name}/{INDEX_FILE} has format {values['format']}, but this version"
                    f" reads {INDEX_FORMAT}. Upgrade, or rebuild."
                )
            measured = values["calibration"]
            return cls(
                entity_type=values["entity_type"],
                default_recall=values["default_recall"],
                facts=_current_facts(values["facts"]),
                calibration=Calibration.from_dict(measured) if measured else None,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexFormatError(
                f"{folder.name}/{INDEX_FILE} cannot be read ({error!r}). Rebuild this release."
            ) from error


def load_ann(folder: Path, record: IndexRecord, corpus: Corpus) -> AnnIndex:
    """Load the ANN index alone.

    Raises:
        IndexFormatError: Files are missing or damaged, or this version does not know the kind.
        UnsupportedCpu: This CPU cannot run it.
    """
    config = AnnConfig(**record.facts["parameters"])
    return load_index(record.kind, folder / "index", corpus.vectors, config)


def _current_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Give a kind that was renamed its current name, and the setting that makes it the same."""
    kind, config = current_kind(facts["kind"], AnnConfig(**facts["parameters"]))
    if kind == facts["kind"]:
        return facts
    parameters = {**facts["parameters"], "sketched_links": config.sketched_links}
    return {**facts, "kind": kind, "parameters": parameters}
