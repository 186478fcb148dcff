"""Word unigrams, word bigrams and character trigrams of many texts at once, and the vocabulary that numbers them.

Notable: texts are one array of code points, so that every step is a few passes over numpy arrays; n-grams are 64-bit keys (a word is a
polynomial hash of its characters, a trigram packs its three code points without loss); the vocabulary is counted in bounded memory.

What is a token, on folded text (`encoders.text.fold`):

* a **word** is a longest run of letters, marks, numbers and connector punctuation; an ideograph, and a symbol such as an emoji, is a
  word of its own; everything else separates;
* a **bigram** is two neighbouring words of one line (a line break, and so the border of two list items, breaks the pair);
* a **trigram** is a character with its left and right neighbour, where a separator counts as a space (``" re" "red" "ed "``); a
  separator is never in the middle;
* soft hyphens, joiners, directional marks and variation selectors are dropped first, so they neither split nor distinguish words.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.errors import BundleError, ConfigError, DataError
from encoders.text import fold

UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

KINDS = ("unigram", "bigram", "trigram")
TEXT_END, LINE_END = "\x00", "\n"
_SEPARATOR, _JOINS, _ALONE, _DROPPED = 0, 1, 2, 3
_PRIME = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_INVERSE = pow(_PRIME, -1, 1 << 64)
_SALTS = np.array([0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0], dtype=np.uint64)  # one per kind
_BATCH_CHARACTERS = 1 << 19
VOCABULARY_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class NgramConfig:
    """How many n-grams of each kind the vocabulary keeps, and how much memory counting them may take."""

    unigrams: int = 200_000
    """Most frequent words kept (paper: 200k)."""
    bigrams: int = 1_000_000
    """Most frequent pairs of words kept (paper: 1M)."""
    trigrams: int = 64_000
    """Most frequent character trigrams kept (paper: 64k)."""
    min_count: int = 1
    """N-grams seen fewer times than this are left out."""
    max_tracked: int = 8_000_000
    """Distinct n-grams of one kind held while counting; beyond it the rarest are forgotten (about 60 bytes each)."""

    def __post_init__(self) -> None:
        for name in ("unigrams", "bigrams", "trigrams"):
            if getattr(self, name) < 0:
                raise ConfigError(f"NgramConfig.{name} ({getattr(self, name)}) must be 0 or more")
        if self.unigrams + self.bigrams + self.trigrams == 0:
            raise ConfigError("NgramConfig: unigrams, bigrams and trigrams are all 0; keep at least one kind")
        if self.min_count < 1:
            raise ConfigError(f"NgramConfig.min_count ({self.min_count}) must be at least 1")
        largest = max(self.unigrams, self.bigrams, self.trigrams)
        if self.max_tracked < largest:
            raise ConfigError(f"NgramConfig.max_tracked ({self.max_tracked}) must be at least the largest vocabulary ({largest})")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Vocabulary sizes in the order of ``KINDS``."""
        return self.unigrams, self.bigrams, self.trigrams


def character_class(character: str) -> int:
    """Class of one folded character: 0 separates, 1 joins a word, 2 is a word alone, 3 is dropped (the table's definition)."""
    category, code = unicodedata.category(character), ord(character)
    if (category == "Cf" and code != 0x200B) or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
        return _DROPPED
    if category == "So" or _is_ideograph(code):
        return _ALONE
    return _JOINS if category[0] in "LMN" or category == "Pc" else _SEPARATOR


def _is_ideograph(code: int) -> bool:
    return 0x3400 <= code <= 0x4DBF or 0x4E00 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFD


@functools.cache
def _class_table() -> npt.NDArray[np.uint8]:
    return np.fromiter((character_class(chr(code)) for code in range(0x110000)), dtype=np.uint8, count=0x110000)


@functools.cache
def _powers(length: int) -> tuple[UInt64, UInt64]:
    """(length,) powers of P and of its inverse modulo 2**64, from exponent 0."""
    return _geometric(_PRIME, length), _geometric(_INVERSE, length)


def _geometric(ratio: int, length: int) -> UInt64:
    factors = np.full(length, ratio, dtype=np.uint64)
    factors[0] = 1
    with np.errstate(over="ignore"):
        return np.cumprod(factors, dtype=np.uint64)


def mix64(values: UInt64) -> UInt64:
    """Scramble 64-bit integers (the finaliser of SplitMix64): a bijection whose every output bit depends on every input bit.

    Args:
        values: uint64, any shape.

    Returns:
        uint64, same shape.
    """
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class NgramOccurrences(NamedTuple):
    """Every n-gram of one kind in a batch of texts, in reading order; ``M`` occurrences."""

    keys: UInt64
    """(M,) 64-bit keys, distinct between kinds; 0 never occurs."""
    starts: Int64
    """(M,) position of the first character (of the middle one for trigrams)."""
    ends: Int64
    """(M,) one past the last character (meaningless for trigrams)."""


class Analysis(NamedTuple):
    """A batch of texts as code points and the n-grams in it."""

    codes: UInt32
    """(L,) folded code points, each text closed by one 0."""
    text_ends: Int64
    """(texts,) position of each text's closing 0."""
    classes: npt.NDArray[np.uint8]
    """(L,) character classes, 0, 1 or 2."""
    kinds: tuple[NgramOccurrences, NgramOccurrences, NgramOccurrences]
    """In the order of ``KINDS``."""


def _code_points(texts: Sequence[str]) -> UInt32:
    """(L,) folded code points of all texts, each closed by one 0."""
    joined = TEXT_END.join(texts) + TEXT_END
    if joined.count(TEXT_END) != len(texts):
        joined = TEXT_END.join([text.replace(TEXT_END, " ") for text in texts]) + TEXT_END
    folded = fold(joined)
    if folded.isascii():
        return np.frombuffer(folded.encode("ascii"), dtype=np.uint8).astype(np.uint32)
    return np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def analyse(texts: Sequence[str]) -> Analysis:
    """Find every n-gram of every text.

    Args:
        texts: Any strings, empty ones included; line breaks separate list items.

    Returns:
        Code points, borders and occurrences; see ``Analysis``.
    """
    if not texts:
        none = NgramOccurrences(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        return Analysis(np.empty(0, np.uint32), np.empty(0, np.int64), np.empty(0, np.uint8), (none, none, none))
    codes = _code_points(texts)
    classes = _class_table()[codes]
    dropped = classes == _DROPPED
    if dropped.any():
        codes, classes = codes[~dropped], classes[~dropped]
    text_ends = np.flatnonzero(codes == 0)
    joins, visible = classes == _JOINS, classes != _SEPARATOR

    # Words. The array ends with a separator, so every word has an end and comparing with the shifted array is safe.
    follows = np.empty_like(joins)  # (L,) the previous character belongs to the same word
    follows[0] = False
    np.logical_and(joins[1:], joins[:-1], out=follows[1:])
    starts = np.flatnonzero(visible & ~follows)
    ends = np.flatnonzero(visible[:-1] & ~follows[1:]) + 1
    words = NgramOccurrences(_word_keys(codes, starts, ends), starts, ends)

    # Bigrams: neighbours with no end of line or text between them.
    line = np.cumsum((codes == 0) | (codes == 10), dtype=np.int32)[starts]
    pairs = np.flatnonzero(line[1:] == line[:-1])
    with np.errstate(over="ignore"):
        raw = words.keys[pairs] * np.uint64(_PRIME) + words.keys[pairs + 1]
    bigrams = NgramOccurrences(_finish(raw, 1), starts[pairs], ends[pairs + 1])

    # Trigrams: code points need 21 bits, so three of them fit a key without loss.
    middles = np.flatnonzero(visible)
    spaced = np.where(visible, codes, np.uint32(32)).astype(np.uint64)
    left = np.where(middles > 0, spaced[middles - 1], np.uint64(32))  # [-1] is the closing 0, a space
    raw = (left << np.uint64(42)) | (spaced[middles] << np.uint64(21)) | spaced[middles + 1]
    trigrams = NgramOccurrences(_finish(raw, 2), middles, middles)
    return Analysis(codes, text_ends, classes, (words, bigrams, trigrams))


def _word_keys(codes: UInt32, starts: Int64, ends: Int64) -> UInt64:
    """(W,) position-free polynomial hashes: sum of mix(c[j]) * P**(j - start), from prefix sums modulo 2**64."""
    forward, backward = _powers(_round_up(len(codes)))
    with np.errstate(over="ignore"):
        terms = mix64(codes.astype(np.uint64) + np.uint64(_PRIME)) * forward[: len(codes)]
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)))
        raw = (sums[ends] - sums[starts]) * backward[starts]
    return _finish(raw, 0)


def _round_up(length: int) -> int:
    return 1 << max(length - 1, 1).bit_length()


def _finish(raw: UInt64, kind: int) -> UInt64:
    with np.errstate(over="ignore"):
        keys = mix64(raw + _SALTS[kind])
    keys[keys == 0] = 1  # 0 marks an empty slot in the table
    return keys


def ngram_text(analysis: Analysis, kind: int, rows: Int64) -> list[str]:
    """The n-grams of the given occurrences as text: ``"word"``, ``"two words"``, ``" tr"``.

    Args:
        analysis: What ``analyse`` returned.
        kind: 0 unigram, 1 bigram, 2 trigram.
        rows: (R,) occurrence numbers within the kind.

    Returns:
        R strings.
    """
    found = analysis.kinds[kind]
    starts, ends = found.starts[rows], found.ends[rows]
    if kind == 2:
        spaced = np.where(analysis.classes != _SEPARATOR, analysis.codes, np.uint32(32))
        around = np.stack((spaced[starts - 1], spaced[starts], spaced[starts + 1]), axis=1)  # (R, 3); [-1] is the closing 0, a space
        text = around.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        return [text[i : i + 3] for i in range(0, len(text), 3)]
    text = analysis.codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    if kind == 0:
        return [text[a:b] for a, b in zip(starts.tolist(), ends.tolist())]
    words = analysis.kinds[0]
    first = np.searchsorted(words.starts, starts)
    return [
        f"{text[a:b]} {text[c:d]}"
        for a, b, c, d in zip(starts.tolist(), words.ends[first].tolist(), words.starts[first + 1].tolist(), ends.tolist())
    ]


def batches_by_size(texts: Iterable[str], characters: int | None = None) -> Iterator[list[str]]:
    """Cut a stream of texts into lists of about ``characters`` characters each, so that arrays stay small."""
    characters = characters or _BATCH_CHARACTERS
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text) + 1
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class NgramCounter:
    """Counts n-grams of a stream of texts in bounded memory.

    At most ``config.max_tracked`` distinct n-grams of each kind are held; when a merge exceeds that, the rarest are forgotten, and
    ``undercount`` says by how much the count of any remaining n-gram may then be too small.
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
                table = table.group_by("key").agg(pl.len().cast(pl.UInt64).alias("count"), pl.col("row").min())
                texts_of_rows = ngram_text(analysis, kind, table["row"].to_numpy())
                table = table.select("key", "count", pl.Series("text", texts_of_rows, dtype=pl.String))
                self._waiting[kind].append(table)
                self._waiting_rows[kind] += table.height
                if self._waiting_rows[kind] >= max(self.config.max_tracked // 4, 1):
                    self._merge(kind)

    def tracked_rows(self) -> int:
        """Most rows held for one kind right now, merged and waiting; at most ``max_tracked`` and a quarter, and one batch."""
        return max(tracked.height + waiting for tracked, waiting in zip(self._tracked, self._waiting_rows))

    def _merge(self, kind: int) -> None:
        if not self._waiting[kind]:
            return
        merged = pl.concat([self._tracked[kind], *self._waiting[kind]]).group_by("key").agg(pl.col("count").sum(), pl.col("text").first())
        self._waiting[kind], self._waiting_rows[kind] = [], 0
        if merged.height > self.config.max_tracked:
            merged = _most_frequent(merged)
            self.undercount[kind] += int(merged["count"][self.config.max_tracked])
            merged = merged.head(self.config.max_tracked)
        self._tracked[kind] = merged

    def vocabulary(self) -> Vocabulary:
        """The most frequent n-grams of each kind, ties broken by the text.

        Raises:
            DataError: Not one n-gram was counted.
        """
        tables = []
        for kind, size in enumerate(self.config.sizes):
            self._merge(kind)
            kept = _most_frequent(self._tracked[kind].filter(pl.col("count") >= self.config.min_count)).head(size)
            tables.append(kept.with_columns(pl.lit(KINDS[kind]).alias("kind")))
        table = pl.concat(tables).select("kind", "text", "count", "key")
        if table.is_empty():
            raise DataError(
                f"the vocabulary would be empty: no n-gram occurs min_count={self.config.min_count} times in the catalogue's text fields; "
                "check the names of the text fields, or lower min_count"
            )
        return Vocabulary(table, self.config, tuple(self.undercount))


def _empty_counts() -> pl.DataFrame:
    return pl.DataFrame(schema={"key": pl.UInt64, "count": pl.UInt64, "text": pl.String})


def _most_frequent(counts: pl.DataFrame) -> pl.DataFrame:
    return counts.sort(["count", "text"], descending=[True, False])


class Vocabulary:
    """One numbering of word unigrams, word bigrams and character trigrams; a token id is a row of ``table``.

    Attributes:
        table: ``kind``, ``text``, ``count``, ``key`` (uint64); unigrams first, then bigrams, then trigrams, each by falling frequency.
        config: What it was counted with.
        undercount: Per kind, by how much a count may be too small because memory was bounded (0: exact).
    """

    def __init__(self, table: pl.DataFrame, config: NgramConfig, undercount: Sequence[int] = (0, 0, 0)) -> None:
        self.table, self.config, self.undercount = table, config, tuple(undercount)
        keys = table["key"].to_numpy()
        if table["key"].n_unique() != len(keys):
            raise BundleError("the vocabulary lists an n-gram twice; count it again from the catalogue")
        self._keys, self._ids, self._shift = _build_table(keys)

    def __len__(self) -> int:
        """Number of token ids."""
        return self.table.height

    def lookup(self, keys: UInt64) -> Int32:
        """Token ids of n-gram keys.

        Args:
            keys: (M,) uint64.

        Returns:
            (M,) int32 ids, -1 for n-grams outside the vocabulary.
        """
        slots = (keys >> self._shift).astype(np.int64)
        held = self._keys[slots]
        ids = np.where(held == keys, self._ids[slots], np.int32(-1))
        open_rows = np.flatnonzero((held != keys) & (held != 0))
        mask = len(self._keys) - 1
        while len(open_rows):
            slots_open = (slots[open_rows] + 1) & mask
            slots[open_rows] = slots_open
            held, wanted = self._keys[slots_open], keys[open_rows]
            hit = held == wanted
            ids[open_rows[hit]] = self._ids[slots_open[hit]]
            open_rows = open_rows[~hit & (held != 0)]
        return ids

    def tokenize(self, texts: Sequence[str]) -> tuple[Int32, Int64]:
        """Token ids of many texts, ragged; n-grams outside the vocabulary are dropped, repeated ones repeat.

        Args:
            texts: Any strings; may be empty.

        Returns:
            ``ids`` (T,) int32 in reading order and ``offsets`` (len(texts) + 1,) int64: text i owns ``ids[offsets[i]:offsets[i + 1]]``.
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
        analysis = analyse(texts)
        by_position = np.full((len(analysis.codes), len(KINDS)), -1, dtype=np.int32)  # (L, 3)
        for kind, found in enumerate(analysis.kinds):
            by_position[found.starts, kind] = self.lookup(found.keys)
        known = by_position >= 0
        ends = np.cumsum(known.sum(axis=1))[analysis.text_ends]
        return by_position[known], ends

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.parquet`` (kind, text, count, key; the row is the token id) and ``vocabulary.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.table.write_parquet(folder / "vocabulary.parquet", compression="zstd", statistics=False)
        described = {
            "format_version": VOCABULARY_FORMAT,
            "rows": len(self),
            "unicode_version": unicodedata.unidata_version,
            "undercount": list(self.undercount),
            "config": asdict(self.config),
        }
        (folder / "vocabulary.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read what ``save`` wrote.

        Raises:
            BundleError: A file is missing, damaged, of another format version, or does not hold the rows it says.
        """
        try:
            described: dict[str, Any] = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            table = pl.read_parquet(folder / "vocabulary.parquet")
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise BundleError(f"{folder}: no readable vocabulary ({error}); copy the whole entity_encoder folder again") from error
        version = described.get("format_version") if isinstance(described, dict) else None
        if version != VOCABULARY_FORMAT:
            raise BundleError(
                f"{folder}: vocabulary format {version!r}, but this code reads {VOCABULARY_FORMAT}; "
                "use the release of omnisearchsage that wrote it"
            )
        if table.columns != ["kind", "text", "count", "key"] or table.height != described.get("rows"):
            raise BundleError(f"{folder}: expected {described.get('rows')} vocabulary rows, but got {table.height}; the file was changed")
        try:
            return cls(table, NgramConfig(**described["config"]), described["undercount"])
        except (KeyError, TypeError, ConfigError) as error:
            raise BundleError(f"{folder}: vocabulary.json is not what this code writes ({error}); use the release that wrote it") from error


def _build_table(keys: UInt64) -> tuple[UInt64, Int32, np.uint64]:
    """Open addressing with linear probing at a load of at most 0.3: slot keys, slot ids, and the shift that maps a key to its slot."""
    bits = max(int(np.ceil(np.log2(max(len(keys), 1) / 0.3))), 4)
    slot_keys, slot_ids = np.zeros(1 << bits, np.uint64), np.full(1 << bits, -1, np.int32)
    shift = np.uint64(64 - bits)
    rows, slots = np.arange(len(keys), dtype=np.int32), (keys >> shift).astype(np.int64)
    while len(rows):
        free = slot_keys[slots] == 0
        slot_keys[slots[free]] = keys[rows[free]]  # where several meet, the last one wins and the others move on
        placed = slot_keys[slots] == keys[rows]
        slot_ids[slots[placed]] = rows[placed]
        rows, slots = rows[~placed], (slots[~placed] + 1) & ((1 << bits) - 1)
    return slot_keys, slot_ids, shift
