"""Count n-grams in bounded memory, number the most frequent, and turn texts into token ids."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from encoders.errors import BundleError, ConfigError, DataError
from encoders.text.hashing import UInt64
from encoders.text.ngrams import (
    KINDS,
    TEXT_RULES,
    Int32,
    Int64,
    analyse,
    batches_by_size,
    ngram_text,
)

log = logging.getLogger(__name__)

VOCABULARY_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """How many n-grams of each kind are kept, and how much memory counting them may take."""

    unigrams: int = 200_000
    """Most frequent words kept (paper: 200k)."""
    bigrams: int = 1_000_000
    """Most frequent pairs of words kept (paper: 1M)."""
    trigrams: int = 64_000
    """Most frequent character trigrams kept (paper: 64k)."""
    min_count: int = 1
    """N-grams seen fewer times than this are left out."""
    max_tracked: int = 8_000_000
    """Distinct n-grams of one kind held while counting, about 60 bytes each.

    Beyond it the rarest are dropped.
    """

    def __post_init__(self) -> None:
        for name in ("unigrams", "bigrams", "trigrams"):
            if getattr(self, name) < 0:
                raise ConfigError(f"NgramConfig.{name} ({getattr(self, name)}) must be 0 or more")
        if self.unigrams + self.bigrams + self.trigrams == 0:
            raise ConfigError(
                "NgramConfig: unigrams, bigrams and trigrams are all 0; keep at least one kind"
            )
        if self.min_count < 1:
            raise ConfigError(f"NgramConfig.min_count ({self.min_count}) must be at least 1")
        largest = max(self.unigrams, self.bigrams, self.trigrams)
        if self.max_tracked < largest:
            raise ConfigError(
                f"NgramConfig.max_tracked ({self.max_tracked}) must be at least the largest"
                f" vocabulary ({largest})"
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the vocabulary sizes in the order of ``KINDS``."""
        return self.unigrams, self.bigrams, self.trigrams


class NgramCounter:
    """Count the n-grams of a stream of texts in bounded memory.

    At most ``config.max_tracked`` distinct n-grams of each kind are held; when a merge exceeds
    that, the rarest are dropped, and ``undercount`` says by how much the count of any remaining
    n-gram may then be too small.
    """

    def __init__(self, config: NgramConfig) -> None:
        self.config = config
        self.undercount = [0, 0, 0]
        self._tracked: list[pl.DataFrame] = [_empty_counts() for _ in KINDS]
        self._waiting: list[list[pl.DataFrame]] = [[] for _ in KINDS]
        self._waiting_rows = [0, 0, 0]

    def add(self, texts: Iterable[str]) -> None:
        """Count the n-grams of these texts."""
        for batch in batches_by_size(texts):
            analysis = analyse(batch)
            for kind, found in enumerate(analysis.kinds):
                if not self.config.sizes[kind] or not len(found.keys):
                    continue
                table = pl.DataFrame({"key": found.keys, "row": np.arange(len(found.keys))})
                table = table.group_by("key").agg(
                    pl.len().cast(pl.UInt64).alias("count"), pl.col("row").min()
                )
                texts_of_rows = ngram_text(analysis, kind, table["row"].to_numpy())
                table = table.select(
                    "key", "count", pl.Series("text", texts_of_rows, dtype=pl.String)
                )
                self._waiting[kind].append(table)
                self._waiting_rows[kind] += table.height
                if self._waiting_rows[kind] >= max(self.config.max_tracked // 4, 1):
                    self._merge(kind)

    def _merge(self, kind: int) -> None:
        """Add a kind's waiting counts to its tracked ones; beyond the bound, drop the rarest."""
        if not self._waiting[kind]:
            return
        merged = (
            pl.concat([self._tracked[kind], *self._waiting[kind]])
            .group_by("key")
            .agg(pl.col("count").sum(), pl.col("text").first())
        )
        self._waiting[kind] = []
        self._waiting_rows[kind] = 0
        if merged.height > self.config.max_tracked:
            merged = _most_frequent(merged)
            self.undercount[kind] += int(merged["count"][self.config.max_tracked])
            merged = merged.head(self.config.max_tracked)
        self._tracked[kind] = merged

    def vocabulary(self) -> Vocabulary:
        """Return the most frequent n-grams of each kind, ties broken by the text.

        Raises:
            DataError: Not one n-gram was counted.
        """
        tables = []
        for kind, size in enumerate(self.config.sizes):
            self._merge(kind)
            kept = _most_frequent(
                self._tracked[kind].filter(pl.col("count") >= self.config.min_count)
            ).head(size)
            tables.append(kept.with_columns(pl.lit(KINDS[kind]).alias("kind")))
        table = pl.concat(tables).select("kind", "text", "count", "key")
        if table.is_empty():
            raise DataError(
                f"the vocabulary would be empty: no n-gram occurs min_count={self.config.min_count}"
                " times in the catalogue's text fields; check the names of the text fields, or"
                " lower min_count"
            )
        return Vocabulary(table, self.config, tuple(self.undercount))


def _empty_counts() -> pl.DataFrame:
    return pl.DataFrame(schema={"key": pl.UInt64, "count": pl.UInt64, "text": pl.String})


def _most_frequent(counts: pl.DataFrame) -> pl.DataFrame:
    return counts.sort(["count", "text"], descending=[True, False])


class Vocabulary:
    """Number word unigrams, word bigrams and character trigrams: a token id is a row of ``table``.

    Attributes:
        table: ``kind``, ``text``, ``count``, ``key`` (uint64); unigrams first, then bigrams, then
            trigrams, each by falling frequency.
        config: What it was counted with.
        rules: The text rules that it was counted with (``ngrams.TEXT_RULES``).
        undercount: Per kind, by how much a count may be too small because memory was bounded (0:
            exact).
    """

    def __init__(
        self,
        table: pl.DataFrame,
        config: NgramConfig,
        undercount: Sequence[int] = (0, 0, 0),
        rules: int = TEXT_RULES,
    ) -> None:
        self.table = table
        self.rules = rules
        self.config = config
        self.undercount = tuple(undercount)
        keys = table["key"].to_numpy()
        if table["key"].n_unique() != len(keys):
            raise BundleError(
                "the vocabulary lists an n-gram twice; count it again from the catalogue"
            )
        self._slots = _build_table(keys)

    def __len__(self) -> int:
        """Return the number of token ids."""
        return self.table.height

    def lookup(self, keys: UInt64) -> Int32:
        """Look up the token ids of n-gram keys.

        Args:
            keys: (M,) uint64.

        Returns:
            (M,) int32 ids, -1 for n-grams outside the vocabulary.
        """
        table = self._slots
        slots = (keys >> table.shift).astype(np.int64)
        held = table.keys[slots]
        ids = np.where(held == keys, table.ids[slots], np.int32(-1))
        open_rows = np.flatnonzero((held != keys) & (held != 0))
        mask = len(table.keys) - 1
        while len(open_rows):
            slots_open = (slots[open_rows] + 1) & mask
            slots[open_rows] = slots_open
            held = table.keys[slots_open]
            hit = held == keys[open_rows]
            ids[open_rows[hit]] = table.ids[slots_open[hit]]
            open_rows = open_rows[~hit & (held != 0)]
        return ids

    def tokenize(self, texts: Sequence[str]) -> tuple[Int32, Int64]:
        """Turn texts into token ids; unknown n-grams are dropped, repeated ones repeat.

        Args:
            texts: Any strings; may be empty.

        Returns:
            ``ids`` (T,) int32 in reading order and ``offsets`` (len(texts) + 1,) int64: text i owns
            ``ids[offsets[i]:offsets[i + 1]]``.
        """
        parts: list[Int32] = []
        lengths: list[Int64] = []
        for batch in batches_by_size(texts):
            ids, ends = self._tokenize_batch(batch)
            parts.append(ids)
            lengths.append(np.diff(ends, prepend=0))
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        if not parts:
            return np.empty(0, np.int32), offsets
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return np.concatenate(parts), offsets

    def _tokenize_batch(self, texts: Sequence[str]) -> tuple[Int32, Int64]:
        analysis = analyse(texts, self.rules)
        by_position = np.full((len(analysis.codes), len(KINDS)), -1, dtype=np.int32)  # (L, 3)
        for kind, found in enumerate(analysis.kinds):
            by_position[found.starts, kind] = self.lookup(found.keys)
        known = by_position >= 0
        ends = np.cumsum(known.sum(axis=1))[analysis.text_ends]
        return by_position[known], ends

    def save(self, folder: Path) -> None:
        """Write the vocabulary into ``folder``.

        ``vocabulary.parquet`` holds kind, text, count and key (the row number is the token id),
        ``vocabulary.json`` the settings.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.table.write_parquet(
            folder / "vocabulary.parquet", compression="zstd", statistics=False
        )
        described = {
            "format_version": VOCABULARY_FORMAT,
            "rows": len(self),
            "text_rules": self.rules,
            "unicode_version": unicodedata.unidata_version,
            "undercount": list(self.undercount),
            "config": asdict(self.config),
        }
        (folder / "vocabulary.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read a vocabulary that ``save`` wrote.

        Raises:
            BundleError: A file is missing, damaged, of another format version, or does not hold the
                rows it says.
        """
        try:
            described: dict[str, Any] = json.loads(
                (folder / "vocabulary.json").read_text(encoding="utf-8")
            )
            table = pl.read_parquet(folder / "vocabulary.parquet", glob=False)
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise BundleError(
                f"{folder}: no readable vocabulary ({error}); copy the whole entity_encoder folder"
                " again"
            ) from error
        version = described.get("format_version") if isinstance(described, dict) else None
        if version != VOCABULARY_FORMAT:
            raise BundleError(
                f"{folder}: vocabulary format {version!r}, but this code reads {VOCABULARY_FORMAT};"
                " use the release of omnisearchsage that wrote it"
            )
        rows = described.get("rows")
        if table.columns != ["kind", "text", "count", "key"] or table.height != rows:
            raise BundleError(
                f"{folder}: expected {rows} vocabulary rows, but got"
                f" {table.height}; the file was changed"
            )
        rules = described.get("text_rules", 1)
        if rules not in range(1, TEXT_RULES + 1):
            raise BundleError(
                f"{folder}: vocabulary with text rules {rules!r}, but this code reads 1 to"
                f" {TEXT_RULES}; use the release of omnisearchsage that wrote it"
            )
        _warn_of_other_unicode(folder, described.get("unicode_version"))
        try:
            return cls(table, NgramConfig(**described["config"]), described["undercount"], rules)
        except (KeyError, TypeError, ConfigError) as error:
            raise BundleError(
                f"{folder}: vocabulary.json is not what this code writes ({error}); use the release"
                " that wrote it"
            ) from error


def _warn_of_other_unicode(folder: Path, version: object) -> None:
    """Say that characters newer than one of two Unicode versions may be read otherwise."""
    if version != unicodedata.unidata_version:
        log.warning(
            "%s: counted with Unicode %s, but this Python has %s: characters that only one of them"
            " knows may be read as other words. Embed with the Python version of the training.",
            folder,
            version,
            unicodedata.unidata_version,
        )


class _HashTable(NamedTuple):
    """Open addressing with linear probing at a load of at most 0.3."""

    keys: UInt64
    """(S,) key of each slot; 0: the slot is empty."""
    ids: Int32
    """(S,) token id of each slot."""
    shift: np.uint64
    """``key >> shift`` is the slot where probing begins."""


def _build_table(keys: UInt64) -> _HashTable:
    """Place every key, whose token id is its row, in a hash table of 2**n slots."""
    bits = max(int(np.ceil(np.log2(max(len(keys), 1) / 0.3))), 4)
    shift = np.uint64(64 - bits)
    slot_keys = np.zeros(1 << bits, np.uint64)
    slot_ids = np.full(1 << bits, -1, np.int32)
    rows = np.arange(len(keys), dtype=np.int32)
    slots = (keys >> shift).astype(np.int64)
    while len(rows):
        free = slot_keys[slots] == 0
        # Where several keys meet in one free slot, the last one gets it and the others move on.
        slot_keys[slots[free]] = keys[rows[free]]
        placed = slot_keys[slots] == keys[rows]
        slot_ids[slots[placed]] = rows[placed]
        rows = rows[~placed]
        slots = (slots[~placed] + 1) & ((1 << bits) - 1)
    return _HashTable(slot_keys, slot_ids, shift)
