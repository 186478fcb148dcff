"""Run the encoders' commands as ``python -m encoders COMMAND``, as ``omni`` does."""

from __future__ import annotations

import click

from encoders.commands.lazy_group import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "data": (
        "encoders.commands.data:group",
        "Import, validate and describe tables; simulate logs.",
    ),
    "enrich": ("encoders.commands.enrich:group", "Board titles, engaged queries and captions."),
    "pairs": ("encoders.commands.pairs:command", "Turn logs into training pairs."),
    "train": (
        "encoders.commands.train:command",
        "Train the query and entity towers from a TOML config.",
    ),
    "evaluate": (
        "encoders.commands.evaluate:command",
        "Labelled Recall@k, MRR and nDCG of a bundle and its baselines.",
    ),
    "judge": (
        "encoders.commands.judge:group",
        "Have results of several systems graded blind, and say who is better.",
    ),
    "embed": ("encoders.commands.embed:command", "Embed a catalogue into the signal store."),
    "export": (
        "encoders.commands.export:command",
        "Export the query tower to ONNX fp32 and int8 forms.",
    ),
}
"""Name -> (module:attribute of a click command, one line of help); ``omni`` lists the same."""


@click.command(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """Turn tables and logs into trained towers and vectors.

    Example: python -m encoders train --help
    """


if __name__ == "__main__":
    main(prog_name="python -m encoders")
