"""A package that is not installed is named with the extra that brings it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from encoders.commands.console import handle_errors
from encoders.commands.lazy_group import LazyGroup
from encoders.errors import MissingDependency
from encoders.extras import EXTRA_OF_MODULE, extra_named
from tests.test_missing_dependencies import EXTRAS, PROJECT, ROOT, packages_of

PACKAGES = ("protos", "encoders", "index_builder", "retrieval")
OWN_ERROR = {
    "datasets",
    "faiss",
    "fasttext",
    "fsspec",
    "ir_measures",
    "pandas",
    "pymilvus",
    "pytorch_optimizer",
    "rabitqlib",
    "redis",
    "sentence_transformers",
    "tensorboard",
    "uvloop",
}
"""Modules whose absence is dealt with where they are imported."""
OF_THE_CLIENT = {"google", "grpc", "grpc_health"}


def imported() -> Iterator[tuple[str, Path]]:
    """Every module of another project that the packages import, and where."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    names = [node.module]
                for name in names:
                    top = name.partition(".")[0]
                    if top not in sys.stdlib_module_names and top not in PACKAGES:
                        yield top, path.relative_to(ROOT)


@pytest.mark.slow
def test_every_imported_package_is_of_the_client_or_names_its_extra() -> None:
    known = OF_THE_CLIENT | OWN_ERROR | set(EXTRA_OF_MODULE) | {"benchmarks"}
    unknown = {name: str(path) for name, path in imported() if name not in known}
    assert not unknown, f"add it to pyproject.toml and encoders/extras.py: {unknown}"


@pytest.mark.parametrize("module", list(EXTRA_OF_MODULE))
def test_extra_of_module_brings_its_distribution(module: str) -> None:
    distribution, extra = EXTRA_OF_MODULE[module]
    assert distribution in packages_of(extra)
    assert distribution not in str(PROJECT["dependencies"]), "the client has it anyway"


def test_serve_brings_none_of_the_packages_of_training() -> None:
    heavy = {"torch", "transformers", "pandas", "matplotlib", "scipy", "onnx", "safetensors"}
    assert not heavy & packages_of("serve")
    assert packages_of("serve") < packages_of("train") < packages_of("all") < packages_of("dev")
    assert len(PROJECT["dependencies"]) == 3 and "serve" in EXTRAS


def test_extra_named_known_module_becomes_one_line_with_the_extra() -> None:
    with (
        pytest.raises(MissingDependency, match=r"^Training needs .*'omnisearchsage\[train\]'$"),
        extra_named("Training"),
    ):
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")


def test_extra_named_unknown_module_stays_what_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="of_ours"), extra_named("Training"):
        raise ModuleNotFoundError("No module named 'of_ours'", name="of_ours")


def test_group_command_that_lacks_a_package_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "encoders.towers.query_tower", raising=False)
    group = LazyGroup({"train": ("encoders.towers.query_tower:command", "")})
    result = CliRunner().invoke(group, ["train"], prog_name="omni")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: omni train needs the package 'transformers'."
        " Install it with: pip install 'omnisearchsage[train]'\n"
    )


def test_command_that_lacks_a_package_while_it_runs_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    @click.command()
    @handle_errors
    def command() -> None:
        import matplotlib  # noqa: F401

    result = CliRunner().invoke(command, prog_name="omni")
    assert result.exit_code == 1
    assert "'omnisearchsage[train]'" in result.stderr and "Traceback" not in result.stderr


def without(modules: list[str], script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that lacks some modules."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {script}"
    return subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)


def test_omni_without_its_packages_names_the_extra() -> None:
    done = without(["click"], "from retrieval.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: The command omni needs the package 'click'."
        " Install it with: pip install 'omnisearchsage[serve]'"
    )


def test_public_name_that_lacks_a_package_names_the_extra() -> None:
    done = without(["torch"], "from encoders import train")
    assert "MissingDependency: encoders.train needs the package 'torch'" in done.stderr


@pytest.mark.slow
def test_server_modules_import_without_the_packages_of_training() -> None:
    heavy = ["torch", "transformers", "pandas", "matplotlib", "scipy", "hnswlib", "safetensors"]
    modules = ["retrieval.server.supervisor", "retrieval.web.page", "index_builder.commands.update"]
    done = without(heavy, "; ".join(f"import {module}" for module in modules))
    assert done.returncode == 0, done.stderr


def test_client_imports_and_asks_without_numpy() -> None:
    script = (
        "from retrieval.client import requests, results; from protos import retrieval_pb2 as pb;"
        "requests.retrieve('a', 'pin', 3, {});"
        "print(results.retrieve_result(pb.RetrieveResponse(hits=[pb.Hit(id='x')])).ids);"
        "results.scores(pb.ScoreResponse())"
    )
    done = without(["numpy"], script)
    assert done.stdout.strip() == "['x']", done.stderr
    assert "'omnisearchsage[vectors]'" in done.stderr
