"""Validation counts a hit as the evaluation does: a tie is a hit only for the earlier row."""

import numpy as np
import torch

from encoders.training.validation import top_k_hits


def test_top_k_hits_tied_candidates_only_first_k_are_hits() -> None:
    queries, candidates = torch.ones(100, 4) / 2, torch.ones(100, 4) / 2
    hits = top_k_hits(queries, candidates, np.arange(100), None, 10)
    assert hits.sum() == 10 and hits[:10].all()


def test_top_k_hits_hidden_row_takes_no_place() -> None:
    queries = torch.eye(3)
    positives, itself = np.array([1, 2, 0]), np.arange(3)
    assert top_k_hits(queries, torch.eye(3), positives, itself, 1).tolist() == [True, False, True]
    not_there = np.full(3, -1)
    assert not top_k_hits(queries, torch.eye(3), positives, not_there, 1).any()
