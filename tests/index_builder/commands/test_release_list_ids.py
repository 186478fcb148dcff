"""``omni release list`` shows ids whole: calls of the service take nothing less."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from index_builder.commands import release as release_commands
from index_builder.releases.store import ReleaseStore, ReleaseSummary

IDS = [f"2026-01-1{day}T09-30-12Z-ab12cd34ef56" for day in range(3)]
COUNTS = {"pin": 1_594_000, "product": 4_855_000, "ad": 378_000, "query": 195_245_000}


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_list_narrow_terminal_cuts_no_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    summaries = [
        ReleaseSummary(
            release_id=id,
            active=id == IDS[-1],
            created="2026-01-14T09:30:12.123+00:00",
            space_id="5a" * 32,
            parent=parent,
            entities=COUNTS,
            size_bytes=10**9,
        )
        for id, parent in zip(IDS, [None, *IDS])
    ]
    monkeypatch.setattr(ReleaseStore, "list", lambda self: summaries)
    ReleaseStore(tmp_path).releases.mkdir()
    result = CliRunner().invoke(
        release_commands.group, ["list", "--store", str(tmp_path)], env={"COLUMNS": columns}
    )
    assert result.exit_code == 0, result.output
    for id in IDS:
        assert any(id in line for line in result.stdout.splitlines()), result.stdout
    assert "…" not in result.stdout
    active = next(line for line in result.stdout.splitlines() if IDS[-1] in line)
    assert "*" in active
