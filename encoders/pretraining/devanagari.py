"""Hindi for a tower whose vocabulary lacks it: Devanagari pieces that mean what the same entities' English words mean.

Multilingual USE, teacher and ancestor of our towers, was not trained on Hindi: its vocabulary holds
single letters of it at best.
"""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from encoders.towers.query_tower import QueryEncoder

SPECIAL_TOKENS = 3
"""Entries at the start of the vocabulary that are no pieces of text."""


def add_devanagari(
    tower: QueryEncoder, by_entity: dict[str, list[str]], pieces: int = 1300
) -> QueryEncoder:
    """Replace the last ``pieces`` vocabulary entries by Devanagari pieces that start at their entities' English token embeddings.

    Args:
        tower: Its tokenizer is a Unigram model whose entries are ordered by rank, special tokens
            first. The table changes in place.
        by_entity: Train texts of each entity, in all languages.
        pieces: At most so many; fewer when the texts hold fewer.

    Returns:
        A tower over the same transformer and projection with the new tokenizer.
    """

    def is_devanagari(text: str) -> bool:
        return any("\u0900" <= character <= "\u097f" for character in text)

    trainer = trainers.UnigramTrainer(
        vocab_size=pieces * 2, unk_token="[UNK]", special_tokens=["[UNK]"], show_progress=False
    )
    counted = Tokenizer(models.Unigram())
    counted.normalizer, counted.pre_tokenizer = (
        tower.tokenizer.backend_tokenizer.normalizer,
        pre_tokenizers.Metaspace(),
    )
    counted.train_from_iterator(
        [text for texts in by_entity.values() for text in texts if is_devanagari(text)], trainer
    )
    found = [
        (piece, score)
        for piece, score in json.loads(counted.to_str())["model"]["vocab"]
        if is_devanagari(piece)
    ][:pieces]
    described = json.loads(tower.tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    first = len(vocabulary) - len(found)
    described["model"]["vocab"] = vocabulary[:first] + [[piece, score] for piece, score in found]
    old = tower.tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        model_max_length=old.model_max_length,
        clean_up_tokenization_spaces=False,
        **old.special_tokens_map,
    )
    new = QueryEncoder(tower.transformer, tokenizer, tower.dimension)
    new.projection.load_state_dict(tower.projection.state_dict())
    table = new.transformer.get_input_embeddings().weight.detach()  # type: ignore[operator]
    sums, counts = torch.zeros(len(found), table.shape[1]), torch.zeros(len(found), 1)
    for texts in by_entity.values():
        hindi = [text for text in texts if is_devanagari(text)]
        english = [text for text in texts if text.isascii()][:20]
        if not hindi or not english:
            continue
        meaning = table[
            torch.tensor(
                [token for ids in new.tokenize(english) for token in ids if token >= SPECIAL_TOKENS]
            )
        ].mean(dim=0)
        for token in (token for ids in new.tokenize(hindi) for token in ids if token >= first):
            sums[token - first] += meaning
            counts[token - first] += 1
    means = sums / counts.clamp_min(1)
    means -= means[counts[:, 0] > 0].mean(dim=0)
    means *= table[SPECIAL_TOKENS:first].norm(dim=1).mean() / means.norm(
        dim=1, keepdim=True
    ).clamp_min(1e-6)
    with torch.no_grad():
        table[first : first + len(found)] = means
    return new
