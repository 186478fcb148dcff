"""The ``omni`` command: a table of commands whose modules load only when they are called (``omni --help`` imports no torch)."""

from __future__ import annotations

import importlib

import click

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("retrieval.demo:command", "Train, evaluate, build, serve and query the sample data, end to end."),
    "data": ("encoders.data_commands:group", "Import, validate and describe tables; simulate logs."),
    "enrich": ("encoders.enrich_commands:group", "Board titles, engaged queries and captions."),
    "pairs": ("encoders.pairs_command:command", "Turn logs into training pairs."),
    "train": ("encoders.train_command:command", "Train the query and entity towers from a TOML config."),
    "evaluate": ("encoders.evaluate_command:command", "Labelled Recall@k, MRR and nDCG of a bundle and its baselines."),
    "embed": ("encoders.embed_command:command", "Embed a catalogue into the signal store."),
    "export": ("encoders.export_command:command", "Export the query tower to ONNX fp32 and int8 forms."),
    "rebuild": ("index_builder.rebuild_command:command", "Embed, build, calibrate, gate and publish a release."),
    "update": ("index_builder.update_command:command", "Apply live upserts and deletes from a file."),
    "release": ("index_builder.release_commands:group", "List, show, verify, diff, activate, roll back and collect releases."),
    "explain": ("index_builder.explain_commands:group", "Why was this id not returned? Where is recall lost?"),
    "serve": ("retrieval.serve_command:command", "Serve the active release over gRPC."),
    "query": ("retrieval.query_command:command", "Ask a running server."),
    "bench": ("benchmarks.commands:group", "Run a benchmark; writes JSON and prints a table."),
}


class LazyGroup(click.Group):
    """A click group that knows each command's one-line help without importing its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return command names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None if the name is unknown."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands with their one-line help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="omnisearchsage")
def main() -> None:
    """OmniSearchSage: one query vector retrieves pins, products, related queries and ads.

    Start with `omni demo`, which trains on the sample data, publishes a release and answers queries in many languages.
    """


if __name__ == "__main__":
    main()
