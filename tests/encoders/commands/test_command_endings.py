"""How commands end: one line and an exit code, and nothing half-written, whatever went wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner

from encoders.commands.console import handle_errors, say, system_error
from encoders.commands.lazy_group import LazyGroup
from encoders.interruption import StopRequest, Terminated, end_process

FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x.parquet")


def ended_by(error: BaseException, *flags: str) -> tuple[int, str]:
    @click.command()
    @handle_errors
    def command() -> None:
        say("working")
        raise error

    result = CliRunner().invoke(command, list(flags))
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (FULL, "/data/x.parquet: No space left on device. Free some space"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "Change its owner"),
        (pl.exceptions.ComputeError("writing failed: No space (os error 28)"), "Free some space"),
        (pa.ArrowInvalid("[errno 28] Error writing bytes to file"), "Free some space"),
        (OSError("No space left on device (os error 28)"), "Free some space"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit -n"),
    ],
)
def test_command_errors_of_the_system_are_one_line(error: Exception, part: str) -> None:
    code, shown = ended_by(error)
    assert code == 1
    assert part in shown.replace("\n", " ")
    assert "Traceback" not in shown


def test_command_system_error_inside_another_error_is_found() -> None:
    try:
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert "Free some space" in str(system_error(error))


def test_command_other_errors_keep_their_traceback() -> None:
    assert system_error(ValueError("a mistake of ours")) is None
    assert system_error(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    code, shown = ended_by(ValueError("a mistake of ours"))
    assert code == 1
    assert "error: " not in shown


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (Terminated("saved in out"), 143, "saved in out"),
    ],
)
def test_command_signals_have_their_exit_codes(error: BaseException, code: int, word: str) -> None:
    found, shown = ended_by(error)
    assert found == code
    assert word in shown


def stopped() -> None:
    signal.raise_signal(signal.SIGTERM)


stopped_command = click.command()(handle_errors(stopped))


def test_command_sigterm_as_process_1_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ignores SIGTERM there without a handler, so the group sets one."""
    monkeypatch.setattr("encoders.commands.lazy_group.os.getpid", lambda: 1)
    group = LazyGroup({"stopped": (f"{__name__}:stopped_command", "")})
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert CliRunner().invoke(group, ["stopped"]).exit_code == 143
    finally:
        assert signal.getsignal(signal.SIGTERM) is end_process
        signal.signal(signal.SIGTERM, before)


def test_command_quiet_prints_errors_alone() -> None:
    assert "working" in ended_by(FULL)[1]
    code, shown = ended_by(FULL, "--quiet")
    assert code == 1
    assert "working" not in shown
    assert "Free some space" in shown


SLEEPER = """
import signal, sys, time
from pathlib import Path
import click
from encoders.commands.console import handle_errors

# A shell starts background jobs with SIGINT ignored, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@handle_errors
def command(folder):
    partial = folder / "partial"
    partial.touch()
    try:
        (folder / "started").touch()
        time.sleep(60)
    finally:
        partial.unlink()

command()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_process_signal_cleans_up_and_says_so(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == code
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    assert not (tmp_path / "partial").exists()


@pytest.mark.slow
def test_process_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path: Path) -> None:
    catalogue = tmp_path / "c.csv"
    lines = "".join(f"p{n},pin,{os.urandom(20).hex()}\n" for n in range(3000))
    catalogue.write_text("id,entity_type,title\n" + lines)
    out = tmp_path / "out" / "c.parquet"
    command = f"ulimit -f 8; exec {sys.executable} -m encoders data convert {catalogue} --out {out}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_process_ascii_terminal_prints_any_text(tmp_path: Path) -> None:
    catalogue = tmp_path / "c.csv"
    catalogue.write_text("id,entity_type,title\np0,Shoe,🎂\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "encoders", "data", "describe", str(catalogue), "--drop-bad-rows"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_stop_request_notes_the_first_signal_and_raises_at_the_second() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.came is Terminated
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_command_misspelt_gets_a_suggestion() -> None:
    from retrieval.cli import main

    result = CliRunner().invoke(main, ["trian"])
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.stderr
