"""Real vectors for index benchmarks: WordLlama or a query tower over `large`'s texts, cached."""

from __future__ import annotations

import gzip
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.commands.console import stage
from encoders.errors import ConfigError, MissingDependency

HELD_OUT_QUERIES = 3_000
"""Queries reported on, and as many again for calibration: both held out of the corpus."""
EAST_ASIAN = ("ja", "ko", "zh")


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorSet:
    """A corpus and two disjoint sets of held-out queries of one distribution.

    Attributes:
        name: What it is, for tables and records.
        corpus: float32 ``(N, 256)``, unit rows.
        queries: float32 ``(Q, 256)``, reported on.
        calibration: float32 ``(C, 256)``, for choosing settings only.
        rows: int64 ``(N,)``, the row of each corpus vector among all texts (stable across sizes).
        source: What made the vectors.
    """

    name: str
    corpus: np.ndarray
    queries: np.ndarray
    calibration: np.ndarray
    rows: np.ndarray
    source: str = "WordLlama"

    def describe(self) -> dict[str, object]:
        """Facts for a benchmark record."""
        return {
            "name": self.name,
            "vectors": len(self.corpus),
            "dimension": int(self.corpus.shape[1]),
            "queries": len(self.queries),
            "calibration_queries": len(self.calibration),
            "source": (
                f"{self.source} over the distinct folded texts of `large` (real texts: annotations"
                " and translations, not clicks)"
            ),
            "real": True,
        }


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


@dataclass(frozen=True, slots=True)
class _Texts:
    """What is known of each distinct text, row by row."""

    languages: np.ndarray
    dev: np.ndarray
    short: np.ndarray


def _read_texts(folder: Path) -> tuple[list[str], _Texts]:
    seen: dict[str, tuple[str, str, bool]] = {}
    for name, is_dev in (("pairs_dev", True), ("pairs_train", False)):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                language, query, _, kind = json.loads(line)
                seen.setdefault(_fold(query), (language, kind, is_dev))
    with gzip.open(folder / "entities.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            entity = json.loads(line)
            for field in ("title", "description"):
                if entity.get(field):
                    seen.setdefault(_fold(entity[field]), ("en", field, False))
    seen.pop("", None)
    texts = list(seen)
    languages = np.array([seen[t][0] for t in texts])
    short = np.array([len(t.split()) <= 3 and seen[t][1] != "title" for t in texts])
    return texts, _Texts(languages, np.array([seen[t][2] for t in texts]), short)


def _embed(texts: list[str], tower: str | None) -> np.ndarray:
    if tower is not None:
        from encoders.towers.pretrained_models import create_query_encoder
        from encoders.towers.query_tower import QueryEncoder

        folder = Path(tower) / "query_encoder"
        encoder = QueryEncoder.load(folder) if folder.is_dir() else create_query_encoder(tower)
        return np.ascontiguousarray(encoder.encode(texts, 512), dtype=np.float32)
    try:
        import wordllama
    except ImportError as error:
        raise MissingDependency("wordllama", "bench", "The index benchmark") from error
    model = wordllama.WordLlama.load(
        cache_dir=os.path.dirname(wordllama.__file__), disable_download=True
    )
    vectors = np.asarray(model.embed(texts, norm=False), dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    norms[norms < 1e-6] = 1.0
    return np.ascontiguousarray(vectors / norms)


def default_cache() -> Path:
    """Where embedded vectors are kept between runs: ``$XDG_CACHE_HOME/omnisearchsage``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnisearchsage"


def _load_all(data_dir: Path, cache: Path, tower: str | None) -> tuple[_Texts, np.ndarray]:
    folder = data_dir / "large" if (data_dir / "large").is_dir() else data_dir
    if not (folder / "pairs_train.jsonl.gz").is_file():
        raise ConfigError(
            f"expected pairs_train.jsonl.gz in {folder}, but it is not there. Point --data (or"
            " OMNI_DATA) at the folder that holds large/."
        )
    facts_path = cache / "wordllama-256-facts.npz"
    vectors_path = cache / (
        "wordllama-256.npy" if tower is None else f"tower-{_tower_name(tower)}.npy"
    )
    if not (facts_path.is_file() and vectors_path.is_file()):
        texts, facts = _read_texts(folder)
        with stage(f"embed {len(texts):,} texts with {tower or 'WordLlama'}"):
            cache.mkdir(parents=True, exist_ok=True)
            partial = vectors_path.with_suffix(".tmp.npy")
            np.save(partial, _embed(texts, tower))
            partial.rename(vectors_path)
            np.savez(facts_path, languages=facts.languages, dev=facts.dev, short=facts.short)
    with np.load(facts_path) as stored:
        facts = _Texts(stored["languages"], stored["dev"], stored["short"])
    return facts, np.load(vectors_path, mmap_mode="r")


def _tower_name(tower: str) -> str:
    """A bundle by its space id, a shipped tower by its name."""
    if not Path(tower).is_dir():
        return tower
    from encoders.towers.bundle import read_space_id

    return read_space_id(Path(tower))[:12]


def load_vectors(
    data_dir: Path,
    *,
    size: int,
    distribution: str = "in",
    cache: Path | None = None,
    seed: int = 0,
    tower: str | None = None,
) -> VectorSet:
    """A corpus of about ``size`` vectors with held-out queries.

    Args:
        data_dir: Folder holding ``large/``.
        size: Corpus size wanted; fewer when the distribution has fewer texts.
        distribution: ``in``: query strings of the dev split over all other texts. ``out``: queries
            in languages the corpus does not hold: up to 100k, short queries that are not English
            over an English corpus; above, East Asian queries over a corpus without them.
        cache: Where embedded vectors are kept.
        seed: Chooses the sample.
        tower: A model bundle or a shipped tower whose query tower embeds the texts; None:
            WordLlama.

    Raises:
        ConfigError: The data are not there, or the distribution is unknown.
        MissingDependency: wordllama is not installed.
    """
    facts, vectors = _load_all(data_dir, cache or default_cache(), tower)
    rng = np.random.default_rng(seed)
    usable = np.concatenate(
        [
            np.abs(np.linalg.norm(vectors[s : s + 65536], axis=1) - 1) < 1e-3
            for s in range(0, len(vectors), 65536)
        ]
    )  # texts without a known token have no vector
    english = facts.languages == "en"
    if distribution == "in":
        candidates = np.flatnonzero(usable & facts.dev)
        corpus_ok = usable
        name = f"in-distribution-{size // 1000}k"
    elif distribution == "out" and size <= 100_000:
        candidates = np.flatnonzero(usable & facts.dev & facts.short & ~english)
        corpus_ok = usable & english
        name = f"out-of-distribution-{size // 1000}k"
    elif distribution == "out":
        foreign = np.isin(
            [language.split("-")[0] for language in facts.languages.tolist()], EAST_ASIAN
        )
        candidates = np.flatnonzero(usable & facts.dev & foreign)
        corpus_ok = usable & ~foreign
        name = f"out-of-distribution-{size // 1000}k"
    else:
        raise ConfigError(f"distribution must be 'in' or 'out', but got {distribution!r}.")
    held_out = rng.permutation(candidates)[: 2 * HELD_OUT_QUERIES]
    half = len(held_out) // 2
    corpus_ok = corpus_ok.copy()
    corpus_ok[held_out] = False
    rows = rng.permutation(np.flatnonzero(corpus_ok))[:size]
    source = (
        f"WordLlama {vectors.shape[1]}-d"
        if tower is None
        else f"the query tower of {_tower_name(tower)}, {vectors.shape[1]}-d,"
    )
    return VectorSet(
        name=name if tower is None else f"tower-{_tower_name(tower)}-{name}",
        source=source,
        corpus=np.ascontiguousarray(vectors[np.sort(rows)]),
        queries=np.ascontiguousarray(vectors[held_out[:half]]),
        calibration=np.ascontiguousarray(vectors[held_out[half:]]),
        rows=np.sort(rows),
    )
