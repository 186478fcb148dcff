"""Import a command's module when the command is called, so that ``--help`` imports no torch."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import click

from encoders.errors import MissingDependency
from encoders.extras import extra_named
from encoders.interruption import end_process


class LazyGroup(click.Group):
    """A click group over a table of commands, each with its one-line help."""

    def __init__(self, table: Mapping[str, tuple[str, str]], **settings: Any) -> None:
        """Make a group.

        Args:
            table: Name -> (``module:attribute`` of a click command, one line of help), in the order
                of the help text.
            settings: What ``click.Group`` takes.
        """
        super().__init__(**settings)
        self.table = table

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run as a program; SIGTERM ends it from now on, whatever its process number."""
        _end_on_sigterm_as_process_1()
        return super().main(*args, **settings)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return command names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None if the name is unknown."""
        if cmd_name not in self.table:
            near = get_close_matches(cmd_name, self.table, n=1)
            if near:
                ctx.fail(f"No such command {cmd_name!r}. Did you mean {near[0]!r}?")
            return None
        module, attribute = self.table[cmd_name][0].split(":")
        try:
            with extra_named(f"{ctx.command_path} {cmd_name}"):
                command: click.Command = getattr(importlib.import_module(module), attribute)
        except MissingDependency as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands with their one-line help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in self.table.items()])


def _end_on_sigterm_as_process_1() -> None:
    """Give SIGTERM its usual effect: the kernel ignores it for the first process of a container.

    Commands that end in their own way install their handlers later.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_process)
