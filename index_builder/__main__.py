"""Run the commands of releases: ``python -m index_builder rebuild|update|release|explain``."""

from __future__ import annotations

import click

from encoders.commands.lazy_group import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "rebuild": (
        "index_builder.commands.rebuild:command",
        "Embed, build, calibrate, gate and publish a release.",
    ),
    "update": (
        "index_builder.commands.update:command",
        "Apply live upserts and deletes from a file.",
    ),
    "release": (
        "index_builder.commands.release:group",
        "List, show, verify, diff, activate, roll back, push, pull and collect releases.",
    ),
    "explain": (
        "index_builder.commands.explain:group",
        "Why was this id not returned? Where is recall lost?",
    ),
}
"""Name -> (module:attribute of a click command, one line of help); ``omni`` lists the same."""


@click.command(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """Build, change and inspect releases.

    Example: python -m index_builder rebuild --help
    """


if __name__ == "__main__":
    main(prog_name="python -m index_builder")
