"""Every ``omni`` command has ``--quiet``, and ``--json`` where it has a result to print."""

from __future__ import annotations

from collections.abc import Iterator

import click

from retrieval.cli import main


def commands_below(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for below in command.list_commands(context):
        found = command.get_command(context, below)
        assert found is not None, f"{name} {below}"
        yield from commands_below(found, f"{name} {below}")


FILES_ALONE = {
    "omni enrich caption-sheet",
    *(f"omni judge {name}" for name in ("add", "oracle", "page", "sample", "sheet")),
}
"""Commands whose result is the file that they write; they print no JSON."""


def test_every_command_has_quiet_and_all_with_a_result_have_json() -> None:
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in commands_below(main, "omni")
    }
    assert [name for name, known in options.items() if "--quiet" not in known] == []
    assert {name for name, known in options.items() if "--json" not in known} == FILES_ALONE
