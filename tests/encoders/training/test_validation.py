"""Validation counts a hit as the evaluation does: a tie is a hit only for the earlier row."""

import numpy as np
import pytest
import torch

from encoders.training.inputs import build_inputs, build_towers
from encoders.training.validation import top_k_hits, validation_hits, validation_recall
from tests.helpers.training_examples import small_config, tiny_query_encoder, world


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


@pytest.mark.parametrize("first", ["entity", "vector:pinsage"])
def test_validation_datasets_of_one_type_measure_each_candidate_in_any_order(first: str) -> None:
    """The entity tower is what the type is measured by; a frozen column has a figure of its own."""
    second = {"entity": "vector:pinsage", "vector:pinsage": "entity"}[first]
    datasets = [
        {"name": "pin", "candidates": [first]},
        {"name": "saved", "entity_type": "pin", "actions": ["save"], "candidates": [second]},
    ]
    config = small_config(datasets=datasets, validation={"fraction": 0.3})
    encoder = tiny_query_encoder()
    inputs = build_inputs(world(vectors=True), config, encoder, torch.device("cpu"))
    towers = build_towers(encoder, inputs)
    hits, recalls = validation_hits(towers, inputs)["pin"], validation_recall(towers, inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in towers.entities.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert (validation_hits(towers, inputs)["pin"] != hits).any()
    again = validation_recall(towers, inputs)
    assert recalls.keys() == {
        "validation/recall@10",
        "validation/recall@10/pin",
        "validation/recall@10/pin/vector:pinsage",
    }
    assert recalls["validation/recall@10"] == recalls["validation/recall@10/pin"]
    frozen = "validation/recall@10/pin/vector:pinsage"
    assert again[frozen] == recalls[frozen]
