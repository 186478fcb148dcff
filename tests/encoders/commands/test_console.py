"""Log lines of the packages reach stderr while a command runs, and only then."""

import logging
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from encoders.commands.console import LOGGED_PACKAGES, handle_errors, print_table
from encoders.commands.report_output import OVERALL_COLUMNS
from encoders.errors import DataError


def command_that(action: object) -> click.Command:
    """A command whose body calls ``action``."""

    @click.command()
    @handle_errors
    def command() -> None:
        action()  # type: ignore[operator]

    return command


def test_command_library_info_line_is_on_stderr_as_it_is() -> None:
    def log_lines() -> None:
        log = logging.getLogger("encoders.training.loop")
        log.info("step 1/2 [50%]")
        log.debug("not shown")
        logging.getLogger("another.library").info("not shown")

    result = CliRunner().invoke(command_that(log_lines))
    assert (result.stdout, result.stderr) == ("", "step 1/2 [50%]\n")


def test_command_quiet_shows_warnings_and_errors_of_the_log() -> None:
    def log_lines() -> None:
        log = logging.getLogger("encoders.training.loop")
        log.info("step 1/2")
        log.warning("loss is NaN")
        log.error("gave up")

    result = CliRunner().invoke(command_that(log_lines), ["--quiet"])
    assert result.stderr == "loss is NaN\ngave up\n"


def test_command_library_that_logs_to_the_root_does_not_double_lines() -> None:
    source = (
        "import logging, click\n"
        "from encoders.commands.console import handle_errors\n"
        "@click.command()\n@handle_errors\n"
        "def command():\n"
        "    logging.warning('of another package')\n"
        "    logging.getLogger('other.part').info('not shown')\n"
        "    logging.getLogger('encoders.part').info('of ours')\n"
        "command()\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "of another package\nof ours\n")


def test_command_within_command_line_is_printed_once() -> None:
    def inner() -> None:
        logging.getLogger("benchmarks.index.ann").info("one line")

    @handle_errors
    def outer() -> None:
        handle_errors(inner)()
        logging.getLogger("benchmarks.index.ann").info("another line")

    result = CliRunner().invoke(command_that(outer))
    assert result.stderr == "one line\nanother line\n"


@pytest.mark.parametrize("error", [None, DataError("broken")])
def test_command_when_ended_leaves_loggers_as_before(error: Exception | None) -> None:
    def body() -> None:
        assert logging.getLogger("encoders").isEnabledFor(logging.INFO)
        if error:
            raise error

    loggers = [logging.getLogger(name) for name in LOGGED_PACKAGES]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    assert CliRunner().invoke(command_that(body)).exit_code == (1 if error else 0)
    assert [(logger.level, logger.handlers) for logger in loggers] == before


def test_print_table_of_systems_fits_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = ["bm25-trigrams", 5489, 0.2, 0.5, "0.480-0.548", *[0.5] * (len(OVERALL_COLUMNS) - 5)]
    print_table("", OVERALL_COLUMNS, [row])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 3  # nothing wraps
    assert "bm25-trigrams" in lines[-1]
