"""Query classification on frozen vectors: paths, scores by hand, the head and fastText on cases
with a known answer.
"""

import numpy as np
import polars as pl
import pytest

from encoders.datasets.dataset import Dataset
from encoders.errors import ConfigError, InvalidVectors
from encoders.evaluation.downstream import (
    FastTextConfig,
    HeadSettings,
    class_path,
    fit_linear_head,
    hierarchical_scores,
    iconclass_path,
    labelled_queries,
    predict_fasttext,
    predict_leaves,
    train_fasttext,
)


@pytest.mark.parametrize(
    ("entity_id", "path"),
    [
        ("ic:25D3k11", ("2", "25", "25D")),
        ("ic:11HH(GERTRUDE)32", ("1", "11", "11HH")),
        ("ic:34k9432", ("3", "34")),
        ("ic:0", ("0",)),
        ("emoji:noto:1f480", ()),
        ("ic:", ()),
    ],
)
def test_iconclass_path_by_hand(entity_id, path):
    assert iconclass_path(entity_id) == path
    if path:
        assert class_path(path[-1]) == path


def test_hierarchical_scores_by_hand():
    # Right leaf; right branch only; nothing said; leaf of depth 2 of which all is true.
    predicted = ["25D", "25F", "", "34"]
    leaves = [["25D"], ["26A", "11H"], ["0"], ["34", "11H"]]
    scores = hierarchical_scores(predicted, leaves)
    assert scores.precision.value == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    assert scores.recall == pytest.approx((1 + 1 / 6 + 0 + 2 / 5) / 4)
    assert scores.level[1].value == pytest.approx(
        3 / 4
    )  # all four have level 1: right, right, wrong, right
    assert scores.level[2].value == pytest.approx(2 / 3)  # "0" has no level 2
    assert scores.level[3].value == pytest.approx(
        1 / 3
    )  # 25D right, 25F wrong, 34 stops above level 3


def dataset():
    rows = [
        ("gold", "ic:25D3", "keyword", "train"),
        ("gold", "ic:31A1", "keyword", "train"),
        ("stones", "ic:25D1", "title", "train"),
    ]
    rows += [
        ("ruby", "ic:25D3", "keyword", "heldout"),
        ("fox", "ic:2", "keyword", "train"),
        ("skull", "emoji:x:1f480", "name", "train"),
    ]
    pairs = pl.DataFrame(
        rows, schema=["query", "entity_id", "kind", "split"], orient="row"
    ).with_columns(language=pl.lit("en"))
    return Dataset(pl.DataFrame({"id": []}), pairs)


def test_labelled_queries_labels_are_classes_of_entities():
    assert labelled_queries(dataset(), "train").select("query", "leaves").rows() == [
        ("gold", ["25D", "31A"]),
        ("stones", ["25D"]),
        ("fox", ["2"]),
    ]
    assert labelled_queries(dataset(), "train", per_kind=1)["kind"].to_list().count("keyword") == 1
    with pytest.raises(ConfigError, match="nothing"):
        labelled_queries(dataset(), "nothing")


def test_linear_head_separable_and_shared_labels_are_learned():
    rng = np.random.default_rng(0)
    centres = {
        "25D": rng.standard_normal(16),
        "31A": rng.standard_normal(16),
        "11H": rng.standard_normal(16),
    }
    leaves = [[list(centres)[i % 3]] for i in range(600)]
    vectors = np.array(
        [centres[row[0]] + 0.3 * rng.standard_normal(16) for row in leaves], dtype=np.float32
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    head, classes = fit_linear_head(vectors[:500], leaves[:500], HeadSettings(epochs=10, batch=64))
    assert classes == ["11H", "25D", "31A"]
    right = [
        found == row[0]
        for found, row in zip(
            predict_leaves(head, classes, vectors[500:]), leaves[500:], strict=True
        )
    ]
    assert np.mean(right) > 0.95
    again, _ = fit_linear_head(vectors[:500], leaves[:500], HeadSettings(epochs=10, batch=64))
    assert all((a == b).all() for a, b in zip(head.parameters(), again.parameters(), strict=True))
    # A class that half of the queries share with another wins over the other.
    both, names = fit_linear_head(
        np.ones((200, 4), np.float32), [["25D", "31A"], ["31A"]] * 100, HeadSettings(epochs=5)
    )
    assert predict_leaves(both, names, np.ones((1, 4), np.float32)) == ["31A"]


def test_linear_head_bad_vectors_are_refused():
    with pytest.raises(InvalidVectors, match="1 values"):
        fit_linear_head(np.array([[np.nan, 1.0], [0.0, 1.0]], np.float32), [["0"], ["1"]])
    with pytest.raises(InvalidVectors, match="expected 3"):
        fit_linear_head(np.zeros((2, 2), np.float32), [["0"]] * 3)


def test_fasttext_known_words_are_classified():
    pytest.importorskip("fasttext")
    texts = ["gold ring", "silver coin", "holy saint", "martyred saint"] * 30
    leaves = [["25D"], ["25D"], ["11H"], ["11H"]] * 30
    model = train_fasttext(texts, leaves, FastTextConfig(dimension=8, buckets=1000))
    assert predict_fasttext(model, ["Saint!", "gold coin", "   "])[:2] == ["11H", "25D"]
