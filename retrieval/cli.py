"""The ``omni`` command: a table of commands whose modules load when they are called.

So ``omni --help`` imports no torch.
"""

from __future__ import annotations

import click

from encoders.__main__ import COMMANDS as ENCODER_COMMANDS
from encoders.commands.lazy_group import LazyGroup
from index_builder.__main__ import COMMANDS as INDEX_COMMANDS

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "retrieval.demo.command:command",
        "Train, evaluate, build, serve and query the sample data, end to end.",
    ),
    "start": (
        "retrieval.start.command:command",
        "From your catalogue and log to answers, step by step.",
    ),
    **ENCODER_COMMANDS,
    **INDEX_COMMANDS,
    "serve": ("retrieval.commands.serve:command", "Serve the active release over gRPC."),
    "query": ("retrieval.commands.query:command", "Ask a running server."),
    "features": (
        "retrieval.commands.features:command",
        "Score given (query, entity) pairs: the columns that a ranker trains on.",
    ),
    "plan": (
        "retrieval.commands.plan:command",
        "Say which parts and how many machines a size needs, by measured figures.",
    ),
    "doctor": (
        "retrieval.commands.doctor:command",
        "Check this machine, the installation and a store, and say what to do.",
    ),
    "bench": ("benchmarks.commands:group", "Run a benchmark; writes JSON and prints a table."),
}


@click.command(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="omnisearchsage")
def main() -> None:
    """OmniSearchSage: one query vector retrieves pins, products, related queries and ads.

    Start with `omni demo`, which trains on the sample data, publishes a release and answers queries
    in many languages.
    """


if __name__ == "__main__":
    main()
