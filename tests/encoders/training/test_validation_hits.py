"""Validation counts a hit as the evaluation does: a tie is a hit only for the candidate that comes
first.
"""

import numpy as np
import torch

from encoders.training.validation import _hits


def test_candidates_that_tie_are_not_all_hits() -> None:
    queries, candidates = torch.ones(100, 4) / 2, torch.ones(100, 4) / 2
    hits = _hits(queries, candidates, torch.arange(100), None, np.arange(100), 10)
    assert hits.sum() == 10 and hits[:10].all()


def test_a_query_that_must_not_find_itself_takes_no_place() -> None:
    queries = torch.eye(3)
    hits = _hits(queries, torch.eye(3), torch.tensor([1, 2, 0]), torch.arange(3), np.arange(3), 1)
    assert hits.tolist() == [True, False, True]
