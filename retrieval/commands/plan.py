"""``omni plan``: which parts and how many machines a size needs, by measured figures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from encoders.commands.console import handle_errors, json_option, print_json, print_table
from retrieval.sizing.figures import KINDS, all_figures
from retrieval.sizing.model import BUSY, Plan, Wanted, plan_for


@click.command("plan")
@click.option("--entities", type=int, required=True, help="Entities of all types together.")
@click.option("--rps", type=float, required=True, help="Calls a second at the peak.")
@click.option("--dimension", default=256, show_default=True, help="Of the vectors.")
@click.option(
    "--kind",
    type=click.Choice(["auto", *KINDS]),
    default="auto",
    show_default=True,
    help="Of the index; auto: symqg where it fits a machine, else int8-graph.",
)
@click.option(
    "--cached-texts",
    default=0.0,
    show_default=True,
    help="Share of calls whose text is in the query cache (nothing is encoded). Measure it:"
    " omni_cache_hits_total.",
)
@click.option(
    "--cached-answers",
    default=0.0,
    show_default=True,
    help="Share of calls whose answer is cached (nothing is searched):"
    " omni_cached_answers_hits_total.",
)
@click.option(
    "--latency-ms",
    type=float,
    default=None,
    help="Say whether the median of a new text on a quiet server stays below this.",
)
@click.option("--cores", default=32, show_default=True, help="Of a machine.")
@click.option("--memory-gib", default=128.0, show_default=True, help="Of a machine.")
@click.option("--spares", default=1, show_default=True, help="Servers that may fail at the peak.")
@json_option
@handle_errors
def command(as_json: bool, **options: Any) -> None:
    """Say which parts, how many machines, what memory and CPU a size needs.

    By figures that were measured on two cores, each with its record in benchmarks/results; what is
    carried beyond what was measured is said. docs/scale.md has the model, from the same code.

    Example: omni plan --entities 100000000 --rps 10000 --memory-gib 512
    """
    wanted = Wanted(**options)
    plan = plan_for(wanted)
    if as_json:
        figures = [asdict(figure) for figure in all_figures()]
        print_json({"wanted": asdict(wanted), "plan": asdict(plan), "figures": figures})
        return
    title = f"{wanted.entities:,} entities, {wanted.rps:,g} calls/s"
    print_table(title, ("what", "how much"), _rows(wanted, plan))
    for heading, lines in (("parts", plan.parts), ("read with care", plan.notes)):
        click.echo(f"\n{heading}:")
        for line in lines:
            click.echo(f"- {line}")


def _rows(wanted: Wanted, plan: Plan) -> list[tuple[str, str]]:
    return [
        ("index", plan.kind),
        ("servers", f"{plan.servers}, {wanted.spares} of them spare"),
        (
            "memory of a server",
            f"{plan.server_memory_gib:,.1f} GiB of {wanted.memory_gib:,g}"
            f"{'' if plan.fits else ': does not fit'}",
        ),
        ("server CPU of a call", f"{plan.call_cpu_us:,.0f} us"),
        (
            "busy cores at the peak, all servers",
            f"{plan.server_cores:,.1f}, at most {BUSY:.0%} of those there are",
        ),
        ("a new text, median, quiet server", f"{plan.new_text_ms:.2f} ms"),
        ("a release, on disk and at the URL", f"{plan.release_gib:,.1f} GiB"),
        ("loading it", f"{plan.load_seconds:,.0f} s"),
        ("memory of a build", f"{plan.build_memory_gib:,.1f} GiB"),
        ("CPU of a full build", f"{plan.build_cpu_hours:,.2f} h"),
        ("CPU of embedding everything once", f"{plan.embed_cpu_hours:,.2f} h"),
    ]
