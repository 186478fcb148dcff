"""Held-out queries have two halves for good; commands that choose look at one only."""

from __future__ import annotations

import polars as pl
import pytest
from click.testing import CliRunner

from encoders.commands.evaluate import command
from encoders.datasets.dataset import load_sample
from encoders.datasets.halves import rows_of_split, split_for_choices
from encoders.errors import ConfigError


def pairs(queries: list[str], split: str = "heldout") -> pl.DataFrame:
    return pl.DataFrame({"query": queries, "split": split})


@pytest.mark.slow
def test_rows_of_split_halves_are_whole_queries_disjoint_and_cover() -> None:
    sample = load_sample(images=False, engaged_queries=0)
    held, dev, test = (sample.split(name) for name in ("heldout", "dev", "test"))
    assert dev.height + test.height == held.height
    folded = [set(part["query"].str.to_lowercase()) for part in (dev, test)]
    assert not folded[0] & folded[1]
    assert 0.45 < len(folded[0]) / (len(folded[0]) + len(folded[1])) < 0.55


def test_rows_of_split_half_depends_on_the_folded_query_alone() -> None:
    queries = [f"Query {i}" for i in range(200)]
    dev = rows_of_split(pairs(queries), "dev")["query"].to_list()
    respelt = rows_of_split(pairs([f"  QUERY\u3000{i}" for i in range(199, -1, -1)]), "dev")
    assert sorted(int(q.split()[1]) for q in dev) == sorted(
        int(q.split()[1]) for q in respelt["query"].to_list()
    )
    assert dev[:5] == ["Query 0", "Query 2", "Query 5", "Query 6", "Query 9"]  # for good


def test_rows_of_split_other_splits_are_themselves() -> None:
    assert rows_of_split(pairs(["a", "b"], "train"), "train").height == 2
    assert rows_of_split(pairs(["a", "b"], "train"), "dev").is_empty()


def test_split_for_choices_test_half_is_refused() -> None:
    assert split_for_choices("heldout") == "dev"
    assert split_for_choices("validation") == "validation"
    with pytest.raises(ConfigError, match="--release"):
        split_for_choices("test")


def test_evaluate_command_test_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_DATA", raising=False)
    result = CliRunner().invoke(command, ["--baselines", "random", "--split", "test"])
    assert result.exit_code == 2
    assert "omni bench recall BUNDLE --release" in result.stderr
