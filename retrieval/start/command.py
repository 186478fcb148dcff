"""``omni start``: one command from own files to answers."""

from __future__ import annotations

import hashlib
import shutil
import socket
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from encoders.commands.console import handle_errors, json_option, print_json, say
from encoders.commands.entity_type import EntityTypeName
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError
from encoders.tables.reading_options import ReadingOptions
from retrieval.client import RetrievalClient
from retrieval.demo.server_process import DemoServer
from retrieval.start import closing
from retrieval.start.recipe import FEWEST_PAIRS, USUAL_WEIGHTS, write_config
from retrieval.start.recognition import (
    Recognised,
    Source,
    as_shell,
    lacking,
    recognise,
    refuse_unused,
)
from retrieval.start.steps import Steps
from retrieval.start.tables import (
    Prepared,
    count_pairs,
    has_held_out,
    hold_out,
    known_queries,
    log_flags,
    pairs_of_titles,
    questions,
)

MARK = "start.json"
"""File in ``--out`` that says that ``omni start`` made the folder."""
GRPC_PORT = 50051
PAGE_PORT = 9464
MOST_QUERIES = 2_000
"""Held-out queries that an evaluation ranks: enough for two digits."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a run writes, and what it was told."""

    out: Path
    minutes: float
    drop_bad_rows: bool

    @property
    def data(self) -> Path:
        """Folder of the tables that training and evaluation read."""
        return self.out / "data"

    @property
    def store(self) -> Path:
        """Folder of the releases."""
        return self.out / "store"

    def plain(self, table: str) -> Path:
        """Return the file of a table as it came, in this project's form."""
        return self.out / f"{table}.parquet"

    def claim(self) -> None:
        """Make the folder, or find that it is of an earlier run.

        Raises:
            ConfigError: It holds other files.
        """
        mark = self.out / MARK
        if self.out.is_dir() and any(self.out.iterdir()) and not mark.is_file():
            raise ConfigError(f"--out {self.out} holds other files: name a new folder.")
        self.out.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def set_aside_other_run(self, run: Path, config: Path) -> None:
        """Rename the folder of a training on other data or settings: it cannot go on with these."""
        digest = hashlib.sha256(config.read_bytes())
        for file in sorted(self.data.rglob("*.parquet")):
            digest.update(file.read_bytes())
        mark = run / f".{MARK}"
        if run.is_dir() and not (mark.is_file() and mark.read_text() == digest.hexdigest()):
            earlier = run.with_name(f"{run.name}_before")
            shutil.rmtree(earlier, ignore_errors=True)
            run.rename(earlier)
            say(f"other data or settings than before: {run} is {earlier} now")
        run.mkdir(exist_ok=True)
        mark.write_text(digest.hexdigest())


def _input_option(name: str, help_text: str, *, required: bool = False) -> Callable[[F], F]:
    path = click.Path(exists=True, path_type=Path)
    return click.option(name, type=path, required=required, help=help_text)


@click.command()
@_input_option("--catalogue", "What can be found: a file or folder of any form.", required=True)
@_input_option("--log", "Search log: who searched what and clicked, saved or bought what.")
@_input_option("--pairs", "Queries with the entity that answers each, instead of a log.")
@_input_option("--boards", "Collections that users saved entities to.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for tables, towers and store: a new one, or one of an earlier omni start.",
)
@click.option(
    "--entity-type",
    type=EntityTypeName(),
    default="product",
    show_default=True,
    help="What the rows are, where a file does not say: any name, such as listing.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Time for the training steps.",
)
@click.option("--port", default=GRPC_PORT, show_default=True, help="gRPC port of the server.")
@click.option("--metrics-port", default=PAGE_PORT, show_default=True, help="Port of the page.")
@click.option(
    "--no-serve", is_flag=True, help="Build and ask everything, and do not go on serving."
)
@click.option(
    "--drop-bad-rows", is_flag=True, help="Leave bad rows out and count them, instead of failing."
)
@json_option
@handle_errors
@reading_flags
def command(
    catalogue: Path,
    log: Path | None,
    pairs: Path | None,
    boards: Path | None,
    out: Path,
    as_json: bool,
    reading: ReadingOptions,
    **flags: Any,
) -> None:
    """Go from your files to answers: recognise, check, pair, train, evaluate, build, serve.

    Columns and values of other systems are recognised and said; what is not recognised is asked
    for, or --rename, --map and --set say it. Each step is an ordinary command, printed as it can be
    repeated. With few pairs, or without a log, nothing is trained: the shipped query tower reads
    queries and entities alike, and words count beside vectors (zero-shot with fusion).

    Example: omni start --catalogue shop.csv --log clicks.csv --out search
    """
    if log and pairs:
        raise ConfigError("give --log or --pairs, not both")
    ports = Ports(0, 0) if flags["no_serve"] else Ports(flags["port"], flags["metrics_port"])
    ports.require_free()
    given = {"catalogue": catalogue, "log": log, "pairs": pairs, "boards": boards}
    files = [
        _recognised(Source.of(path, table, reading), reading, flags["entity_type"], ask=not as_json)
        for table, path in given.items()
        if path
    ]
    refuse_unused([source for source, _ in files], reading)
    plan = Plan(out, flags["minutes"], flags["drop_bad_rows"])
    plan.claim()
    steps = Steps(to_stderr=as_json, text_vectors=plan.out / "text_vectors")
    _convert(plan, steps, files)
    prepared = _pair(plan, steps, {source.table for source, _ in files})
    zero_shot = sum(prepared.train_pairs.values()) < FEWEST_PAIRS
    model = _train(plan, steps, prepared, zero_shot=zero_shot)
    report = _evaluate(plan, steps, model, prepared)
    _build(plan, steps, model, prepared, zero_shot=zero_shot)
    steps.begin("ask", "start a server and ask it")
    with DemoServer(plan.store, port=ports.grpc, metrics_port=ports.page) as server:
        latency = _ask(server, plan, prepared)
        steps.end()
        summary = {
            "commands": steps.as_job(),
            "train_pairs": prepared.train_pairs,
            "zero_shot": zero_shot,
            "recall@10": closing.recalls(report),
            "fusion": closing.fusions(plan.store),
            "latency_ms": asdict(latency) if latency else None,
            **closing.sizes(plan.store),
            "seconds": steps.seconds,
            "total_seconds": round(sum(steps.seconds.values()), 1),
        }
        _show(summary, steps, as_json=as_json)
        serve = as_shell(["serve", "--store", str(plan.store), *ports.flags()])
        if flags["no_serve"]:
            say(f"\nserve it: {serve}")
        else:
            _go_on_serving(server, serve)


class Ports(NamedTuple):
    """Ports of the server."""

    grpc: int
    page: int

    def require_free(self) -> None:
        """Find out now, not after the training, that a port is taken.

        Raises:
            ConfigError: One is.
        """
        for option, port in zip(("--port", "--metrics-port"), self, strict=True):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise ConfigError(
                        f"{option} {port}: {error.strerror}. End what listens there, name another"
                        f" port ({option} {port + 1}), or give --no-serve."
                    ) from error

    def flags(self) -> list[str]:
        """Write the ports as flags of ``omni serve``, where they are not the usual ones."""
        flags = [f"--port={self.grpc}"] if self.grpc not in (0, GRPC_PORT) else []
        return flags + ([f"--metrics-port={self.page}"] if self.page not in (0, PAGE_PORT) else [])


def _recognised(
    source: Source, reading: ReadingOptions, entity_type: str, *, ask: bool
) -> tuple[Source, Recognised]:
    """Find out how a file reads; what is not recognised is asked for in a terminal.

    Raises:
        ConfigError: Columns are missing.
    """
    found = recognise(source, reading, entity_type)
    while found.missing and found.free and ask and sys.stdin.isatty():
        column = found.missing[0]
        answer = click.prompt(
            f"{source.path.name}: which column is the {column}? ({', '.join(found.free)})",
            type=click.Choice(found.free),
            show_choices=False,
            err=True,
        )
        reading = replace(reading, rename={**reading.rename, answer: column})
        found = recognise(source, reading, entity_type)
    if found.missing:
        raise ConfigError(lacking(source, found.missing, found.free))
    return source, found


def _convert(plan: Plan, steps: Steps, files: Sequence[tuple[Source, Recognised]]) -> None:
    """Write each file as a table of this project."""
    steps.begin("convert", "check the files and write them as tables")
    for source, recognised in files:
        for flag in recognised.found:
            say(f"recognised in {source.path.name}: {flag}")
        drop = plan.drop_bad_rows or source.table == "log"
        steps.run(
            *("data", "convert", source.path, "--table", source.table),
            *("--out", plan.plain(source.table), *recognised.given, *recognised.found),
            *(["--drop-bad-rows"] if drop else []),
        )


def _pair(plan: Plan, steps: Steps, tables: set[str]) -> Prepared:
    """Write ``OUT/data``: the catalogue, enriched by log and boards, and the pairs."""
    steps.begin("pair", "make pairs, and enrich the catalogue")
    plain, enriched = plan.plain("catalogue"), plan.data / "catalogue.parquet"
    boards = ["--boards", plan.plain("boards")] if "boards" in tables else []
    if "log" in tables:
        log = plan.plain("log")
        steps.run(
            *("pairs", "--log", log, "--catalogue", plain, "--out", plan.data, "--overwrite"),
            *(*log_flags(log), *boards),
        )
        found = plan.data / "pairs"
    else:
        shutil.rmtree(plan.data, ignore_errors=True)
        plan.data.mkdir()
        if boards:
            steps.run("enrich", "boards", "--catalogue", plain, *boards, "--out", enriched)
        else:
            steps.run("data", "convert", plain, "--table", "catalogue", "--out", enriched)
        if "pairs" not in tables:
            return Prepared(None, {}, False)
        found = plan.data / "pairs.parquet"
        shutil.copyfile(plan.plain("pairs"), found)
        hold_out(found)
    return Prepared.read(found, enriched)


def _train(plan: Plan, steps: Steps, prepared: Prepared, *, zero_shot: bool) -> Path:
    """Train, or make a bundle of the shipped tower; return the bundle."""
    total = sum(prepared.train_pairs.values())
    if zero_shot:
        steps.begin("train", "take the shipped tower as it is")
        say(
            f"{total:,} train pairs are fewer than {FEWEST_PAIRS:,}: the shipped query tower finds"
            " more untrained than trained on them, with words beside vectors (zero-shot with"
            " fusion)"
        )
        titles = plan.data / "titles.parquet"
        pairs_of_titles(plan.data / "catalogue.parquet", titles)
        prepared = Prepared(titles, count_pairs(titles), False)
    else:
        steps.begin("train", f"train on {total:,} pairs, {plan.minutes:g} min and the set-up")
    config = plan.out / "run.toml"
    write_config(config, prepared, round(60 * plan.minutes), zero_shot=zero_shot)
    run = plan.out / ("zero_shot" if zero_shot else "run")
    plan.set_aside_other_run(run, config)
    steps.run("train", config, "--out", run)
    return run / "model"


def _evaluate(plan: Plan, steps: Steps, model: Path, prepared: Prepared) -> dict[str, Any] | None:
    """Measure held-out queries beside BM25, as they are served; None: none are held out.

    An evaluation gives entities without engaged queries those of the train pairs, unless told not
    to; the release has the catalogue's alone.
    """
    steps.begin("evaluate", "measure held-out queries beside BM25")
    if not has_held_out(plan.data):
        say("no pair is held out: nothing to measure")
        return None
    report = steps.ask(
        *("evaluate", model, "--data", plan.data, "--baselines", "bm25"),
        *("--max-queries", MOST_QUERIES),
        *([] if prepared.has_engaged_queries else ["--engaged-queries", 0]),
    )
    return report


def _build(plan: Plan, steps: Steps, model: Path, prepared: Prepared, *, zero_shot: bool) -> None:
    """Embed the catalogue and publish a release."""
    steps.begin("build", "embed the catalogue, build the indexes and prove them")
    tables = ["--catalogue", plan.data / "catalogue.parquet"]
    proof: list[object] = []
    frequent = plan.data / "frequent_queries.txt"
    if frequent.is_file() and frequent.stat().st_size:
        proof += ["--queries", frequent]
    if prepared.pairs is not None and prepared.train_pairs:
        queries = plan.out / "queries.parquet"
        if known_queries(prepared.pairs, plan.data, queries):
            say(f"{queries}: the queries that are known, to vote for what they led to")
            tables += ["--catalogue", queries]
        proof += ["--pairs", prepared.pairs]
    if zero_shot:
        proof += ["--fusion-weights", USUAL_WEIGHTS]
    steps.run("rebuild", "--store", plan.store, "--bundle", model, *tables, *proof)


def _ask(server: DemoServer, plan: Plan, prepared: Prepared) -> closing.Latency | None:
    """Wait until the server is ready, and time queries for the largest entity type."""
    with RetrievalClient(server.address) as client:
        server.wait_until_ready(client)
        entities = closing.sizes(plan.store)["entities"]
        own = {name: count for name, count in entities.items() if name != "query"} or entities
        largest = max(own, key=lambda name: own[name])
        return closing.measure_latency(client, largest, questions(plan.data, prepared, largest))


def _show(summary: dict[str, Any], steps: Steps, *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    say("\nAs a job, these commands do the same again:")
    for line in steps.as_job():
        say(f"  {line}")
    closing.show(summary)


def _go_on_serving(server: DemoServer, command_line: str) -> None:
    """Serve until Ctrl-C; in a terminal the page opens."""
    say(f"\n$ {command_line}")
    say(f"serving on {server.address}; look at {server.page}   (Ctrl-C ends it)")
    if sys.stdout.isatty():
        webbrowser.open(server.page)
    try:
        while True:
            time.sleep(1)
            server.check()
    except KeyboardInterrupt:
        say(f"ended. Again: {command_line}")
