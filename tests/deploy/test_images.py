"""The images: what the Dockerfiles, Compose and Kubernetes promise of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
IMAGES = [("Dockerfile", "serve"), ("Dockerfile", "train"), ("Dockerfile.gpu", "gpu")]


def stages(file: str) -> dict[str, list[tuple[str, str]]]:
    """Name -> instructions of a stage, those of the stage it starts from first."""
    text = re.sub(r"^#.*\n", "", (DOCKER / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.partition(" ")
        start = re.fullmatch(r"(\S+) AS (\w+)", rest) if word == "FROM" else None
        if start is not None:
            current = list(found.get(start[1], []))
            found[start[2]] = current
        elif word:
            current.append((word, rest))
    return found


def values(stage: list[tuple[str, str]], word: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == word]


@pytest.mark.parametrize(("file", "name"), IMAGES)
def test_image_runs_as_a_numbered_user_under_an_init(file: str, name: str) -> None:
    stage = stages(file)[name]
    assert values(stage, "USER") == ["1000"], "Kubernetes checks runAsNonRoot by the number"
    assert stage.index(("USER", "1000")) > max(
        n for n, (word, _) in enumerate(stage) if word == "RUN"
    )
    assert values(stage, "ENTRYPOINT") == ['["tini", "--", "omni"]']
    assert any("install" in run and " tini" in run for run in values(stage, "RUN"))


@pytest.mark.parametrize(("file", "name"), IMAGES)
def test_image_writes_nothing_beside_tmp_and_carries_no_compiler(file: str, name: str) -> None:
    stage = stages(file)[name]
    environment = " ".join(values(stage, "ENV"))
    assert "PYTHONDONTWRITEBYTECODE=1" in environment and "HOME=/tmp" in environment
    runs = " ".join(values(stage, "RUN"))
    assert "g++" not in runs and "--no-cache-dir" in runs and "constraints.txt" in runs


def test_torch_is_only_where_training_is_wanted() -> None:
    cpu = stages("Dockerfile")
    assert "torch" not in str(cpu["serve"]) and "[serve," in str(cpu["serve"])
    assert " torch" in str(cpu["train"]) and "[train," in str(cpu["train"])
    assert "NVIDIA" not in str(cpu) and "NVIDIA_VISIBLE_DEVICES=all" in str(
        stages("Dockerfile.gpu")
    )


def compose_service() -> dict[str, Any]:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yml").read_text(encoding="utf-8"))
    service: dict[str, Any] = compose["services"]["omni"]
    return service


def test_compose_builds_the_serving_image_with_a_read_only_root() -> None:
    service = compose_service()
    build = service["build"]
    assert (ROOT / "deploy" / build["context"]).resolve() == ROOT
    assert build["target"] in stages(Path(build["dockerfile"]).name)
    assert (ROOT / build["dockerfile"]).is_file() and build["target"] == "serve"
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]


def test_files_that_the_builds_copy_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    needed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "encoders"}
    assert not needed & {name.strip("/") for name in ignored} and ".git" in ignored
    for needs in needed:
        assert (ROOT / needs).exists()


def test_release_workflow_builds_every_python_and_platform() -> None:
    import tomllib

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    matrix = workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]
    assert {(entry["os"].split("-")[0], entry["archs"]) for entry in matrix} == {
        ("ubuntu", "x86_64"), ("ubuntu", "aarch64"), ("macos", "arm64"), ("macos", "x86_64"),
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    built = project["tool"]["cibuildwheel"]["build"]
    assert built == ["cp311-*", "cp312-*", "cp313-*", "cp314-*"]
    publish = workflow["jobs"]["publish"]
    assert set(publish["needs"]) == set(workflow["jobs"]) - {"publish"}
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert "password" not in str(publish["steps"])
