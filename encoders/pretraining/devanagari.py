"""Add Devanagari pieces to a tower whose vocabulary lacks them.

Multilingual USE, teacher and ancestor of our towers, was not trained on Hindi: its vocabulary holds
single letters of it at best. A new piece starts at what the same entities' English words mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from encoders.towers.query_tower import QueryEncoder

SPECIAL_TOKENS = 3
"""Entries at the start of the vocabulary that are no pieces of text."""
ENGLISH_TEXTS = 20
"""English texts of an entity that are read."""


def add_devanagari(
    tower: QueryEncoder, by_entity: dict[str, list[str]], pieces: int = 1300
) -> QueryEncoder:
    """Replace the last vocabulary entries by Devanagari pieces.

    Each piece starts at the mean English token embedding of its entities.

    Args:
        tower: Its tokenizer is a Unigram model whose entries are ordered by rank, special tokens
            first. The table changes in place.
        by_entity: Train texts of each entity, in all languages.
        pieces: At most so many; fewer when the texts hold fewer.

    Returns:
        A tower over the same transformer and projection with the new tokenizer.
    """
    texts = [text for group in by_entity.values() for text in group if is_devanagari(text)]
    found = _count_pieces(tower.tokenizer, texts, pieces)
    tokenizer, first = _replace_last_pieces(tower.tokenizer, found)
    changed = QueryEncoder(tower.transformer, tokenizer, tower.dimension)
    changed.projection.load_state_dict(tower.projection.state_dict())
    table = changed.transformer.get_input_embeddings().weight.detach()  # type: ignore[operator]
    means = _english_means(changed, by_entity, slice(first, first + len(found)), table)
    size = table[SPECIAL_TOKENS:first].norm(dim=1).mean()
    means *= size / means.norm(dim=1, keepdim=True).clamp_min(1e-6)
    with torch.no_grad():
        table[first : first + len(found)] = means
    return changed


def is_devanagari(text: str) -> bool:
    """Tell whether a text holds a Devanagari character."""
    return any("\u0900" <= character <= "\u097f" for character in text)


def _count_pieces(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], pieces: int
) -> list[tuple[str, float]]:
    """Train a Unigram model on the texts and return its first Devanagari pieces with scores."""
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces * 2, unk_token="[UNK]", special_tokens=["[UNK]"], show_progress=False
    )
    counted = Tokenizer(models.Unigram())
    counted.normalizer = tokenizer.backend_tokenizer.normalizer
    counted.pre_tokenizer = pre_tokenizers.Metaspace()
    counted.train_from_iterator(texts, trainer)
    vocabulary = json.loads(counted.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocabulary if is_devanagari(piece)][:pieces]


def _replace_last_pieces(
    tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, float]]
) -> tuple[PreTrainedTokenizerFast, int]:
    """Put pieces in the place of the last vocabulary entries; returns the first one's token id."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    first = len(vocabulary) - len(pieces)
    described["model"]["vocab"] = vocabulary[:first] + [[piece, score] for piece, score in pieces]
    replaced = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
    return replaced, first


def _english_means(
    tower: QueryEncoder, by_entity: Mapping[str, list[str]], new: slice, table: Tensor
) -> Tensor:
    """Average, for each new token, the English token embeddings of its entities, centred."""
    sums = torch.zeros(new.stop - new.start, table.shape[1])
    counts = torch.zeros(new.stop - new.start, 1)
    for texts in by_entity.values():
        hindi = [text for text in texts if is_devanagari(text)]
        english = [text for text in texts if text.isascii()][:ENGLISH_TEXTS]
        if not hindi or not english:
            continue
        tokens = [id for ids in tower.tokenize(english) for id in ids if id >= SPECIAL_TOKENS]
        meaning = table[torch.tensor(tokens)].mean(dim=0)
        for token in (id for ids in tower.tokenize(hindi) for id in ids if id >= new.start):
            sums[token - new.start] += meaning
            counts[token - new.start] += 1
    means = sums / counts.clamp_min(1)
    means -= means[counts[:, 0] > 0].mean(dim=0)
    return means
