"""The commands of docs/howto/logs_to_pairs.md work as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_commands_for_your_own_data_work_in_an_empty_folder(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```bash\n(.*?)```",
        (DOCS / "howto" / "logs_to_pairs.md").read_text(encoding="utf-8"),
        re.S,
    )
    assert len(blocks) >= 4
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    done = subprocess.run(
        ["bash", "-ec", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert pl.read_parquet(tmp_path / "serving.parquet")["engaged_queries"].list.len().min() >= 1
    assert pl.read_parquet(tmp_path / "training" / "pairs" / "*.parquet").height > 0
