"""``python -m index_builder rebuild|update|release|explain``: the same commands as ``omni``."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "rebuild": "index_builder.rebuild_command:command",
    "update": "index_builder.update_command:command",
    "release": "index_builder.release_commands:group",
    "explain": "index_builder.explain_commands:group",
}


class _Commands(click.Group):
    """Imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.command(cls=_Commands)
def main() -> None:
    """Build, change and inspect releases.

    Example: python -m index_builder rebuild --help
    """


if __name__ == "__main__":
    main(prog_name="python -m index_builder")
