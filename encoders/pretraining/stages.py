"""Train the shipped query tower in two stages, both with the teacher's vectors as a second target.

Stage one contrasts two texts of one entity; stage two contrasts a text with one free vector per
entity, which takes half the transformer passes per pair and holds all of the entity's texts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from encoders.commands.console import say, stage
from encoders.pretraining.config import PretrainingConfig
from encoders.pretraining.corpus import Corpus
from encoders.towers.query_tower import QueryEncoder, pad
from encoders.towers.shipped_tower import pack_tower

Int64 = npt.NDArray[np.int64]

SNAPSHOT_STEPS = 250
PROGRESS_STEPS = 50
HEAD_TEXTS = 20_000
"""Texts from which stage two's second head starts, by least squares."""


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """Length of a stage and of its learning rate: a linear warm-up, then a cosine."""

    steps: int
    warmup: int
    cosine_steps: int
    """Steps over which the cosine falls to 0; more than ``steps`` leave its end out."""
    pairs_per_step: int

    def rate(self, step: int) -> float:
        """Compute the learning rate relative to its peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.cosine_steps))
        return min((step + 1) / self.warmup, cosine)


class _Loop:
    """Takes a stage's optimiser steps; clips gradients, packs snapshots, prints progress."""

    def __init__(
        self,
        tower: QueryEncoder,
        groups: list[dict[str, Any]],
        schedule: _Schedule,
        distillation_weight: float,
        snapshot: Path | None,
    ) -> None:
        self.tower = tower
        self.schedule = schedule
        self.distillation_weight = distillation_weight
        self.snapshot = snapshot
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimiser, schedule.rate)
        self.started = time.perf_counter()
        self.done = 0
        self.pairs = 0
        self.running = np.zeros(2)  # softmax loss and distance, averaged over the last steps

    def step(self, softmax: Tensor, distance: Tensor, pairs: int) -> None:
        """Take one step on ``softmax + weight * distance``, losses of ``pairs`` pairs."""
        loss = softmax + self.distillation_weight * distance
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimiser.step()
        self.rates.step()
        self.done += 1
        self.pairs += pairs
        self.running = 0.95 * self.running + 0.05 * np.array([softmax.item(), distance.item()])
        if self.done % SNAPSHOT_STEPS == 0 and self.snapshot:
            tower = self.tower
            pack_tower(self.snapshot, tower.transformer, tower.tokenizer, tower.projection)
        if self.done % PROGRESS_STEPS == 0:
            say(self.progress())

    def progress(self) -> str:
        """Describe losses, speed and the time left in one line."""
        steps = self.schedule.steps
        rate = self.pairs / (time.perf_counter() - self.started)
        softmax, distance = self.running / (1 - 0.95**self.done)
        minutes = (steps - self.done) * self.schedule.pairs_per_step / rate / 60
        return (
            f"step {self.done:05d}/{steps} | softmax {softmax:.3f} | distance {distance:.3f} |"
            f" {rate:,.0f} pairs/s | {minutes:.1f} min left"
        )


# ---------------------------------------------------------------------------------------- stage one


class PairSampler:
    """Draws pairs of texts of one entity; sources by share, entities uniformly within a source."""

    def __init__(self, corpus: Corpus, config: PretrainingConfig) -> None:
        self.groups: dict[str, list[Int64]] = {name: [] for name, _ in config.source_shares}
        for entity, texts in corpus.by_entity.items():
            source = entity.split(":", 1)[0]
            rows = np.array([corpus.row_of[text] for text in texts])
            self.groups[source if source in self.groups else "other"].append(rows)
        self.shares = dict(config.source_shares)
        self.rng = np.random.default_rng(config.seed)

    def draw(self, count: int) -> tuple[Int64, Int64]:
        """Draw rows of left and right texts, each (count,)."""
        left, right = [], []
        for source, share in self.shares.items():
            entities = self.groups[source]
            for pick in self.rng.integers(len(entities), size=round(count * share)):
                a, b = self.rng.choice(entities[pick], size=2, replace=False)
                left.append(a)
                right.append(b)
        return np.array(left), np.array(right)

    def draw_by_length(self, lengths: Int64, pairs: int, batches: int) -> list[tuple[Int64, Int64]]:
        """Draw several batches of pairs at once, sorted by length, so that there is little padding.

        Args:
            lengths: Tokens of each row.
            pairs: Pairs of a batch.
            batches: Batches drawn; a batch of one pair is dropped.
        """
        left, right = self.draw(pairs * batches)
        order = np.argsort(np.maximum(lengths[left], lengths[right]), kind="stable")
        chunks = [order[start : start + pairs] for start in range(0, len(order), pairs)]
        self.rng.shuffle(chunks)
        return [(left[chunk], right[chunk]) for chunk in chunks if len(chunk) > 1]


def softmax_pair_loss(left: Tensor, right: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Compute the symmetric in-batch softmax loss between paired rows.

    Args:
        left: (B, D) unit rows.
        right: (B, D) unit rows.
        same: bool (B, B): accidental hits, which are masked.
        temperature: Divides the cosines.
    """
    logits = left @ right.T / temperature  # (B, B)
    off_diagonal = ~torch.eye(len(left), dtype=torch.bool)
    logits = logits.masked_fill(same & off_diagonal, -torch.inf)
    target = torch.arange(len(left))
    forth = nn.functional.cross_entropy(logits, target)
    back = nn.functional.cross_entropy(logits.T, target)
    return (forth + back) / 2


def train_on_texts(
    tower: QueryEncoder, corpus: Corpus, config: PretrainingConfig, snapshot: Path | None
) -> None:
    """Run stage one: pull texts of one entity together, and all rows to the teacher's vectors."""
    head = nn.Linear(config.width, config.width)
    encoded = corpus.tokenize(tower, config.max_tokens)
    lengths = np.array([len(row) for row in encoded])
    folded = _numbers_of_folded(corpus.texts)
    sampler = PairSampler(corpus, config)
    words = _token_table(tower)
    rest = [p for p in [*tower.parameters(), *head.parameters()] if p is not words]
    groups: list[dict[str, Any]] = [
        {"params": [words], "lr": config.table_learning_rate, "weight_decay": 0.0},
        {"params": rest, "lr": config.learning_rate, "weight_decay": 0.01},
    ]
    schedule = _Schedule(
        steps=config.steps,
        warmup=max(1, config.steps // 20),
        cosine_steps=config.steps,
        pairs_per_step=config.pairs_per_step,
    )
    loop = _Loop(tower, groups, schedule, config.distillation_weight, snapshot)
    batches: list[tuple[Int64, Int64]] = []
    while loop.done < config.steps:
        batches = batches or sampler.draw_by_length(lengths, config.pairs_per_step, 8)
        left, right = batches.pop()
        pieces = corpus.random_pieces(sampler.rng, config.pieces_per_step)
        rows = np.concatenate([left, right, pieces])
        state = _cls_states(tower, [encoded[row] for row in rows])
        vectors = nn.functional.normalize(tower.projection(state[: 2 * len(left)]), dim=-1)
        same = torch.from_numpy(folded[left][:, None] == folded[right][None, :])
        softmax = softmax_pair_loss(
            vectors[: len(left)], vectors[len(left) :], same, config.temperature
        )
        loop.step(softmax, _distance(head(state), corpus.teacher_vectors(rows)), len(left))


def _numbers_of_folded(texts: Sequence[str]) -> Int64:
    """Number texts by their case-folded form; int64 (N,)."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(text.casefold(), len(number)) for text in texts])


# ---------------------------------------------------------------------------------------- stage two


class EntityPairs:
    """Draws text-entity pairs; sources by share, entities uniformly within a source."""

    def __init__(self, corpus: Corpus, config: PretrainingConfig) -> None:
        self.entities = [
            np.array([corpus.row_of[text] for text in texts]) for texts in corpus.by_entity.values()
        ]
        names = [name for name, _ in config.source_shares]
        sources = np.array([entity.split(":", 1)[0] for entity in corpus.by_entity])
        known = np.isin(sources, names)
        self.groups = [
            np.flatnonzero(sources == name if name != "other" else ~known) for name in names
        ]
        self.shares = [share for _, share in config.source_shares]
        self.keys = np.unique(
            np.concatenate([rows * len(self.entities) + e for e, rows in enumerate(self.entities)])
        )
        self.rng = np.random.default_rng(config.seed + 1)

    def draw(self, count: int, random_entities: int) -> tuple[Int64, Int64, Int64]:
        """Draw text rows (B,), their entities (B,) and candidate entities (C,), sorted.

        Candidates are the entities of the batch and about ``random_entities`` random ones.
        """
        picked = self._draw_entities(count)
        texts = np.array([self.rng.choice(self.entities[entity]) for entity in picked])
        others = self._draw_entities(random_entities)
        return texts, picked, np.unique(np.concatenate([picked, others]))

    def _draw_entities(self, count: int) -> Int64:
        by_source = zip(self.groups, self.shares, strict=True)
        return np.concatenate(
            [self.rng.choice(group, round(count * share)) for group, share in by_source]
        )

    def positives(self, texts: Int64, candidates: Int64) -> npt.NDArray[np.bool_]:
        """Tell which candidates people gave each text to, bool (B, C)."""
        keys = texts[:, None] * len(self.entities) + candidates[None, :]
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: npt.NDArray[np.bool_] = self.keys[place] == keys
        return found


def train_on_entities(
    tower: QueryEncoder, corpus: Corpus, config: PretrainingConfig, snapshot: Path | None
) -> None:
    """Run stage two: pull texts to a free vector of their entity, and all rows to the teacher's."""
    encoded = corpus.tokenize(tower, config.max_tokens)
    pairs = EntityPairs(corpus, config)
    prototypes = _prototypes(tower, corpus, pairs)
    head = _head_by_least_squares(tower, corpus, encoded, config)
    words = _token_table(tower)
    rest = [p for p in tower.parameters() if p is not words]
    rate = config.entity_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [words], "lr": rate / 3, "weight_decay": 0.0},
        {"params": [*rest, *head.parameters()], "lr": rate, "weight_decay": 0.01},
        {"params": [prototypes], "lr": 2e-3, "weight_decay": 0.0},
    ]
    schedule = _Schedule(
        steps=config.entity_steps,
        warmup=60,
        cosine_steps=config.entity_schedule_steps,
        pairs_per_step=config.queries_per_step,
    )
    loop = _Loop(tower, groups, schedule, config.distillation_weight, snapshot)
    while loop.done < config.entity_steps:
        rows, entities, candidates = pairs.draw(config.queries_per_step, config.random_entities)
        order = np.argsort([len(encoded[row]) for row in rows], kind="stable")
        rows, entities = rows[order], entities[order]
        pieces = corpus.random_pieces(pairs.rng, config.pieces_per_step)
        parts = [*np.array_split(rows, 4), pieces]  # by length, so that there is little padding
        state = torch.cat([_cls_states(tower, [encoded[row] for row in part]) for part in parts])
        queries = nn.functional.normalize(tower.projection(state[: len(rows)]), dim=-1)
        vectors = nn.functional.normalize(prototypes[torch.from_numpy(candidates)], dim=-1)
        logits = queries @ vectors.T / config.temperature  # (B, C)
        target = np.searchsorted(candidates, entities)
        others = pairs.positives(rows, candidates)
        others[np.arange(len(rows)), target] = False
        logits = logits.masked_fill(torch.from_numpy(others), -torch.inf)
        softmax = nn.functional.cross_entropy(logits, torch.from_numpy(target))
        aim = corpus.teacher_vectors(np.concatenate([rows, pieces]))
        loop.step(softmax, _distance(head(state), aim), len(rows))


def _prototypes(tower: QueryEncoder, corpus: Corpus, pairs: EntityPairs) -> nn.Parameter:
    """Start each entity's free vector at the mean vector of its texts; (entities, D)."""
    with stage("embed the train texts to start the entities' vectors"):
        vectors = tower.encode(corpus.texts, batch_size=512)
    means = np.stack([vectors[rows].mean(axis=0) for rows in pairs.entities])
    return nn.Parameter(torch.from_numpy(means / np.linalg.norm(means, axis=1, keepdims=True)))


def _head_by_least_squares(
    tower: QueryEncoder, corpus: Corpus, encoded: list[Int64], config: PretrainingConfig
) -> nn.Linear:
    """Start the head to the teacher's vectors from least squares on some texts."""
    head = nn.Linear(config.width, config.width)
    rng = np.random.default_rng(config.seed)
    some = rng.choice(len(corpus.texts), HEAD_TEXTS, replace=False)
    parts = [some[start : start + 500] for start in range(0, len(some), 500)]
    with torch.inference_mode():
        states = [_cls_states(tower, [encoded[row] for row in part], exact=True) for part in parts]
    hidden = torch.cat(states).numpy()
    aim = corpus.teacher_vectors(some).numpy()
    aim /= np.linalg.norm(aim, axis=1, keepdims=True)
    weight = np.linalg.lstsq(hidden, aim, rcond=None)[0]
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight.T))
    return head


# ------------------------------------------------------------------------------------- both stages


def _token_table(tower: QueryEncoder) -> nn.Parameter:
    transformer: Any = tower.transformer
    table: nn.Parameter = transformer.embeddings.word_embeddings.weight
    return table


def _cls_states(tower: QueryEncoder, encoded: Sequence[Int64], *, exact: bool = False) -> Tensor:
    """Compute [CLS] states in bf16, or in float32 if ``exact``; float32 (B, width)."""
    ids, mask = pad([row.tolist() for row in encoded], 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        output = tower.transformer(input_ids=ids, attention_mask=mask)
        state: Tensor = output.last_hidden_state[:, 0]
    return state.float()


def _distance(vectors: Tensor, aim: Tensor) -> Tensor:
    """Compute the mean cosine distance of paired rows."""
    return 1 - nn.functional.cosine_similarity(vectors, aim).mean()
