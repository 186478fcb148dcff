"""Bundles go to a hub and come back the same; a folder stands in for the hub."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.errors import BundleError
from encoders.towers.bundle import load_bundle, save_bundle
from encoders.towers.hub import Hub, from_pretrained, push_to_hub
from encoders.training.loop import train
from tests.helpers.training_examples import small_config, tiny_query_encoder, world


class FolderHub:
    """A hub in a folder; it keeps no empty folders and adds a file of its own, as the hub does."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok
        if repo_id.count("/") != 1:
            raise ValueError("repo id must be OWNER/NAME")
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        (self.root / repo_id / ".gitattributes").write_text("")

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        revision: str | None,
        commit_message: str,
        ignore_patterns: list[str],
        delete_patterns: str,
    ) -> None:
        assert delete_patterns == "*"
        repo = self.root / repo_id
        for child in repo.iterdir():
            if child.name != ".gitattributes":
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        for file in sorted(folder_path.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                target = repo / file.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def snapshot_download(self, repo_id: str, *, revision: str | None) -> str:
        if not (self.root / repo_id).is_dir():
            raise OSError("404 not found")
        return str(self.root / repo_id)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from encoders.training.loop import TrainStart

    result = train(small_config(steps=1), world(), start=TrainStart(tiny_query_encoder()))
    folder = tmp_path_factory.mktemp("hub") / "model"
    save_bundle(folder, result.query_encoder, result.entity_encoders, metrics={"loss": 1.5})
    return folder


def test_bundle_comes_back_from_the_hub_the_same(bundle: Path, tmp_path: Path) -> None:
    hub = FolderHub(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    (tmp_path / "me" / "model" / "old.bin").write_bytes(b"of an older bundle")
    push_to_hub(bundle, "me/model", hub=hub)
    assert not (tmp_path / "me" / "model" / "old.bin").exists()
    found, wanted = from_pretrained("me/model", hub=hub), load_bundle(bundle)
    assert found.space_id == wanted.space_id
    texts = ["red chair", "blue hat"]
    np.testing.assert_array_equal(found.embed_queries(texts), wanted.embed_queries(texts))


def test_from_pretrained_takes_a_folder(bundle: Path) -> None:
    assert from_pretrained(bundle).space_id == load_bundle(bundle).space_id


def test_from_pretrained_changed_on_the_hub_is_refused(bundle: Path, tmp_path: Path) -> None:
    hub = FolderHub(tmp_path)
    push_to_hub(bundle, "me/model", hub=hub)
    (tmp_path / "me" / "model" / "query_encoder" / "more.bin").write_bytes(b"x")
    with pytest.raises(BundleError, match="space id"):
        from_pretrained("me/model", hub=hub)


def test_hub_that_refuses_is_one_line(bundle: Path, tmp_path: Path) -> None:
    hub = FolderHub(tmp_path)
    with pytest.raises(BundleError, match="hf auth login"):
        push_to_hub(bundle, "no-owner", hub=hub)
    with pytest.raises(BundleError, match="404"):
        from_pretrained("me/nothing", hub=hub)


def test_model_card_is_one_for_the_hub(bundle: Path) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: omnisearchsage" in head and "pipeline_tag: sentence-similarity" in head
    assert "- loss: 1.5" in text and "from_pretrained" in text
    assert load_bundle(bundle).space_id in text


def test_hub_of_the_library_takes_what_is_sent(bundle: Path, tmp_path: Path) -> None:
    """The calls bind to the real client's signatures, which nothing here sends to a network."""
    from huggingface_hub import HfApi

    class Recorder(FolderHub):
        def __getattribute__(self, name: str) -> Any:
            method = super().__getattribute__(name)
            if name not in ("create_repo", "upload_folder", "snapshot_download"):
                return method

            def checked(*args: Any, **kwargs: Any) -> Any:
                inspect.signature(getattr(HfApi, name)).bind(None, *args, **kwargs)
                return method(*args, **kwargs)

            return checked

    hub: Hub = Recorder(tmp_path)
    push_to_hub(bundle, "me/model", hub=hub)
    from_pretrained("me/model", hub=hub)
