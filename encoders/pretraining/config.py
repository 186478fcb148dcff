"""The settings of the shipped query tower's recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainingConfig:
    """How the shipped tower is made."""

    vocabulary_size: int = 46_000
    """Pieces of the vocabulary; the packed tower spends about 260 bytes on each."""
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
    """Shares of the pairs from emoji, Iconclass, and the rest (icons and openclipart)."""
    entity_steps: int = 1000
    """Steps of stage two."""
    entity_schedule_steps: int = 1600
    """Steps of stage two's cosine: its slow end is left to the training on the user's data."""
    queries_per_step: int = 768
    """Queries per step of stage two."""
    entity_learning_rate: float = 5e-4
    """Peak rate of the tower in stage two; the token embeddings move at a third of it."""
    random_entities: int = 1024
    """Random entities of the same sources beside those of the batch, in stage two."""
    seed: int = 7
