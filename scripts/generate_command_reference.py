"""Write docs/reference/commands.md: the `--help` of every `omni` command.

`--check` changes nothing and exits with 1 if the file is not what the commands say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from retrieval.cli import main as omni

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands.md"
WIDTH = 100
HEAD = """\
# Commands

What `--help` says, command by command. This page is generated: after a change of a command run
`python scripts/generate_command_reference.py`.

Each command exits with 0 only on success, with 1 on errors in data or state, with 2 on wrong flags
or settings; `--json` prints one JSON object on standard output and nothing else; notes and progress
go to standard error.
"""


def commands(
    command: click.Command, name: str = "omni", parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """Give the full name and the help text of a command and of all below it."""
    context = click.Context(
        command, parent, info_name=name, terminal_width=WIDTH, **command.context_settings
    )
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from commands(found, below, context)


def page() -> str:
    """Make the text of the page."""
    parts = [HEAD]
    for name, text in commands(omni):
        level = "#" * min(2 + max(name.count(" ") - 1, 0), 4)
        parts.append(f"{level} {name}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def run() -> int:
    """Write the page, or check it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, report differences")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(
        "docs/reference/commands.md is not what the commands' --help says."
        " Run: python scripts/generate_command_reference.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(run())
