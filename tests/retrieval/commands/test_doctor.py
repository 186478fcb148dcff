"""``omni doctor``: what it finds here, and in stores that are whole, empty or damaged."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from index_builder.releases.store import ReleaseStore
from retrieval.commands import doctor
from tests.helpers.serving.real_server import SmallStore


def findings(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(doctor.command, [*map(str, arguments), "--json"])
    found = json.loads(result.stdout)
    return result.exit_code, {finding["name"]: finding for finding in found["findings"]}


def test_doctor_whole_store_has_no_problem(small_store: SmallStore) -> None:
    code, found = findings("--store", small_store.store.root)
    assert code == 0
    assert "all checksums hold" in found["active release"]["found"]
    for name in ("Python", "torch", "polars", "cores", "open files"):
        assert found[name]["found"]


def test_doctor_folder_without_releases_is_a_problem(tmp_path: Path) -> None:
    code, found = findings("--store", tmp_path)
    assert code == 1
    assert "omni rebuild" in found[f"store {tmp_path}"]["advice"]


def test_doctor_damaged_release_is_a_problem(small_store: SmallStore, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(small_store.store.root, root)
    release = ReleaseStore(root).path_of(small_store.release_id)
    victim = max((p for p in release.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    code, found = findings("--store", root)
    assert code == 1
    assert found["active release"]["state"] == "problem"


def test_doctor_port_in_use_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "PORTS", {"gRPC": taken.getsockname()[1]})
        (finding,) = doctor.check_ports()
    assert (finding.state, finding.found) == ("note", "in use")
    assert "--port" in finding.advice


def test_doctor_table_names_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor.command, ["--store", str(tmp_path)])
    assert result.exit_code == 1
    assert "omni rebuild makes a store" in result.stderr
