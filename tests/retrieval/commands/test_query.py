"""``omni query`` as a user runs it: against a real server, in a process of its own where the exit
code matters.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from retrieval.client.config import require_target
from retrieval.client.results import Hit
from retrieval.commands.query import command, rows_of, usual_type
from tests.helpers.serving.real_server import Running


@pytest.fixture
def running(running_server: Running) -> Running:
    return running_server


def ask(running: Running, *args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, [*args, "--server", running.address, "--deadline", "20"])
    return result.exit_code, result.stdout, result.stderr


def test_query_table_shows_titles_and_ids(running: Running) -> None:
    code, out, _ = ask(running, "red cat", "--type", "pin", "-k", "3", "--attribute", "price")
    assert code == 0
    assert "title" in out
    assert "price" in out
    assert out.count("pin-") == 3


def test_query_json_holds_the_whole_answer(running: Running) -> None:
    code, out, _ = ask(
        running,
        "red cat",
        "--type",
        "product",
        "-k",
        "2",
        "--json",
        "--filter",
        "price < 30",
        "--attribute",
        "*",
    )
    answer = json.loads(out)
    assert code == 0
    assert [hit["attributes"]["price"] < 30 for hit in answer["hits"]] == [True, True]
    assert answer["release_id"] == running.release_id
    assert answer["selectivity"] is not None


def test_query_ready_vector_is_accepted(running: Running, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", running.encoder.encode(["red cat"])[0])
    code, out, _ = ask(
        running,
        "--embedding",
        str(tmp_path / "v.npy"),
        "--space-id",
        running.space_id,
        "-k",
        "1",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["hits"]
    (tmp_path / "bad.npy").write_bytes(b"no array")
    assert ask(running, "--embedding", str(tmp_path / "bad.npy"), "--space-id", "x")[0] == 2


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["red cat", "--type", "video"], 1, "NOT_FOUND"),
        (["red cat", "-k", "0"], 1, "INVALID_ARGUMENT"),
        ([], 2, "either TEXT or --embedding"),
        (["red cat", "--filter", "price <"], 1, "INVALID_ARGUMENT"),
    ],
)
def test_query_mistake_gets_one_line_and_an_exit_code(
    running: Running, args: list[str], code: int, says: str
) -> None:
    result = ask(running, *args)
    assert result[0] == code
    assert says in result[2]
    assert "Traceback" not in result[2]


def test_query_without_a_server_says_so() -> None:
    arguments = [
        sys.executable,
        "-m",
        "retrieval.cli",
        "query",
        "x",
        "--server",
        "127.0.0.1:9",
        "--deadline",
        "1",
    ]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "UNAVAILABLE" in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_query_table_has_an_emoji_column_where_a_hit_has_one() -> None:
    hits = [
        Hit("a", 0.9, {"character": "🐋", "title": "whale", "tags": list("abcdefgh")}),
        Hit("b", 0.8, {"title": "fish"}),
    ]
    columns, rows = rows_of(hits, ["tags"])
    assert columns == ["#", "score", "", "title", "id", "tags"]
    assert rows[0] == [1, 0.9, "🐋", "whale", "a", "a, b, c, d, e, f …"]
    assert rows_of([Hit("a", 0.5, {})], []) == (["#", "score", "id"], [[1, 0.5, "a"]])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"query": 50_000, "package": 1_000, "ad": 3}, "package"),
        ({"query": 5, "pin": 1, "product": 9}, "pin"),
        ({"query": 5}, "query"),
        ({}, "pin"),
    ],
)
def test_usual_type_is_no_known_query_where_there_is_anything_else(
    counts: dict[str, int], expected: str
) -> None:
    assert usual_type(counts) == expected


@pytest.mark.parametrize(
    "server",
    ["localhost", "localhost:99999", "localhost:0", "localhost:http", "::1:5", "", "h:1:2"],
)
def test_query_server_without_a_possible_port_is_refused(server: str) -> None:
    result = CliRunner().invoke(command, ["x", "--server", server])
    assert result.exit_code == 2
    assert "HOST:PORT" in result.stderr


@pytest.mark.parametrize("target", ["localhost:50051", "[::1]:443", "unix:/run/omni.sock", "h:1"])
def test_require_target_possible_address_is_taken(target: str) -> None:
    require_target(target)


def test_query_text_that_is_no_utf8_is_refused() -> None:
    result = CliRunner().invoke(command, ["k\udce4se"])
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr
    assert "Traceback" not in result.output
