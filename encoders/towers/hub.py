"""Share whole model bundles through the Hugging Face hub: both towers, space id and model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from encoders.errors import BundleError
from encoders.towers.bundle import ModelBundle, check_space_id, load_bundle

LEFT_OUT = (".*", "**/.*")
"""Hidden files are no part of a bundle."""


class Hub(Protocol):
    """What is needed of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository unless it is there."""

    def upload_folder(self, **settings: Any) -> Any:
        """Make one commit of a folder."""

    def snapshot_download(self, repo_id: str, **settings: Any) -> str:
        """Bring a revision onto this machine; return its folder."""


def push_to_hub(
    bundle: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    hub: Hub | None = None,
) -> None:
    """Put a bundle on the hub as one commit; files of an older one there are removed.

    Args:
        bundle: Folder, as written by `omni train`.
        repo_id: ``OWNER/NAME``; made if it is not there.
        private: Whether a new repository is private.
        revision: Branch; None: the main one.
        hub: None: the hub, with the token that ``hf auth login`` or ``HF_TOKEN`` gives.

    Raises:
        BundleError: The bundle is damaged, or the hub refused.
    """
    space_id = check_space_id(bundle)
    hub = hub or _hub()
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=bundle,
            revision=revision,
            commit_message=f"Model bundle of space {space_id[:16]}",
            ignore_patterns=list(LEFT_OUT),
            delete_patterns="*",
        )
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{repo_id}: the hub did not take the bundle ({error}). Is the name OWNER/NAME, and is"
            " there a token that may write (hf auth login)?"
        ) from error


def from_pretrained(
    name: str | Path, *, revision: str | None = None, hub: Hub | None = None
) -> ModelBundle:
    """Load a bundle from a folder, or from the hub by name, and check its space id.

    Args:
        name: A folder, or ``OWNER/NAME`` on the hub.
        revision: Branch, tag or commit; a commit gives the same bundle for ever.
        hub: None: the hub, by way of its cache on this machine.

    Raises:
        BundleError: It is not there, or its files are not those that were saved.
    """
    if Path(name).is_dir():
        return load_bundle(Path(name))
    hub = hub or _hub()
    try:
        folder = hub.snapshot_download(str(name), revision=revision)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{name}: neither a folder, nor did the hub give it ({error}). Offline, name the folder"
            " of a bundle."
        ) from error
    return load_bundle(Path(folder))


def _hub() -> Hub:
    from huggingface_hub import HfApi

    hub: Hub = HfApi()
    return hub
