"""When the file that names a store's active release has to be read."""

from pathlib import Path

import pytest

from index_builder.releases.store import CURRENT_NAME, ReleaseStore
from retrieval.releases import current_file
from retrieval.releases.current_file import CurrentFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "releases").mkdir()
    return tmp_path / "releases" / CURRENT_NAME


def test_current_file_is_due_when_it_appears_changes_or_goes(tmp_path: Path, path: Path) -> None:
    current = CurrentFile(ReleaseStore(tmp_path))
    assert not current.is_due(), "there is none, as before"
    for content in ("r1", "longer"):
        path.write_text(content)
        assert current.is_due()
        current.mark_read()
        assert not current.is_due()
    path.unlink()
    assert current.is_due()


def test_current_file_refused_is_due_again_later(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = CurrentFile(ReleaseStore(tmp_path))
    path.write_text("r1")
    current.mark_read()
    current.mark_refused()
    assert not current.is_due()
    monkeypatch.setattr(current_file, "RETRY_REFUSED_SECONDS", -1.0)
    assert current.is_due()
    current.mark_read()
    assert not current.is_due(), "what could be served needs no retry"


def test_current_file_unread_is_due_at_once(tmp_path: Path, path: Path) -> None:
    current = CurrentFile(ReleaseStore(tmp_path))
    path.write_text("r1")
    current.mark_read()
    current.mark_unread()
    assert current.is_due()
