"""What the stages of the shipped tower's recipe draw and lose, on a small corpus."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from encoders.pretraining.config import PretrainingConfig
from encoders.pretraining.corpus import Corpus
from encoders.pretraining.stages import EntityPairs, PairSampler, softmax_pair_loss

BY_ENTITY = {
    "emoji:1": ["cat", "gato"],
    "ic:2": ["dog", "perro", "cat"],
    "noto:3": ["sun", "sol"],
}


@pytest.fixture
def corpus() -> Corpus:
    texts = list(dict.fromkeys(text for group in BY_ENTITY.values() for text in group))
    targets = np.zeros((len(texts), 512), np.float16)
    return Corpus(BY_ENTITY, texts, ["ca"], targets, np.zeros((512, 8), np.float32))


def test_softmax_pair_loss_accidental_hit_does_not_count() -> None:
    torch.manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    right = left.clone()
    right[2] = right[0]  # the third pair's text is the first pair's as well
    same = torch.eye(3, dtype=torch.bool)
    unmasked = softmax_pair_loss(left, right, same, 0.05)
    same[0, 2] = same[2, 0] = True
    assert softmax_pair_loss(left, right, same, 0.05) < unmasked - 0.1


def test_pair_sampler_pairs_are_two_texts_of_one_entity(corpus: Corpus) -> None:
    left, right = PairSampler(corpus, PretrainingConfig()).draw(40)
    for a, b in zip(left, right, strict=True):
        pair = {corpus.texts[a], corpus.texts[b]}
        assert len(pair) == 2
        assert any(pair <= set(texts) for texts in BY_ENTITY.values())


def test_pair_sampler_batches_by_length_hold_pairs_of_like_length(corpus: Corpus) -> None:
    lengths = np.array([len(text) for text in corpus.texts])
    batches = PairSampler(corpus, PretrainingConfig()).draw_by_length(lengths, 10, 4)
    assert sum(len(left) for left, _ in batches) == 40
    longest = [np.maximum(lengths[left], lengths[right]) for left, right in batches]
    spans = sorted((int(values.min()), int(values.max())) for values in longest)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_entity_pairs_positives_are_all_entities_of_a_text(corpus: Corpus) -> None:
    pairs = EntityPairs(corpus, PretrainingConfig())
    texts = np.array([corpus.row_of["cat"], corpus.row_of["sun"]])
    found = pairs.positives(texts, np.array([0, 1, 2]))
    assert found.tolist() == [[True, True, False], [False, False, True]]
    rows, entities, candidates = pairs.draw(20, 10)
    assert set(entities) <= set(candidates)
    assert pairs.positives(rows, entities).diagonal().all()
