"""``omni judge``: draw results of several systems blind, have them graded, say who is better."""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)
from encoders.errors import ConfigError
from encoders.tables.schemas import ENTITY_TYPES

if TYPE_CHECKING:
    from encoders.datasets.dataset import Dataset
    from encoders.relevance.report import RelevanceReport
    from encoders.relevance.systems import System
    from encoders.towers.bundle import ModelBundle

sample_argument = click.argument(
    "sample", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
judge_option = click.option(
    "--judge", required=True, help="Name of the judge; grades go to grades/NAME.jsonl."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def group() -> None:
    """Draw results of several systems blind, have them graded, and say who is better.

    Example: omni judge sample --help
    """


@group.command("sample")
@click.argument("systems", nargs=-1, required=True)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the sample, to be written.",
)
@click.option(
    "--entity-type",
    default="pin",
    show_default=True,
    type=click.Choice(ENTITY_TYPES[:2] + ENTITY_TYPES[3:]),
    help="What is retrieved.",
)
@click.option(
    "--queries",
    "query_table",
    type=click.Path(path_type=Path, exists=True),
    help="Table of queries to draw from. [default: those of the split's pairs]",
)
@click.option(
    "--split", default="dev", show_default=True, help="Without --queries: whose pairs' queries."
)
@click.option(
    "--count",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    help="Queries to draw.",
)
@click.option(
    "--k",
    default=10,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="First results of each system to judge.",
)
@click.option("--seed", default=0, show_default=True, help="Draws queries and orders items.")
@data_option
@handle_errors
def draw(
    systems: tuple[str, ...],
    out: Path,
    entity_type: str,
    query_table: Path | None,
    split: str,
    count: int,
    k: int,
    seed: int,
    data_dir: Path | None,
) -> None:
    """Draw queries by popularity and language, and the first results of SYSTEMS, without names.

    A system is a model bundle, a baseline of `omni evaluate`, or NAME=FILE with stored results
    (query, entity_id, rank). Judges see items.jsonl; results.jsonl, which says who returned what,
    is read by the report alone.

    Example: omni judge sample runs/model bm25-ngrams --count 200 --out judged
    """
    from encoders.relevance.sample import SampleSettings, refuse_existing, write_sample
    from encoders.relevance.systems import draw_sample, query_population
    from encoders.tables.files import read_table

    refuse_existing(out)
    dataset, loaded = _load_systems(systems, data_dir)
    if query_table is None:
        from encoders.datasets.halves import split_for_choices

        population = query_population(dataset, entity_type, split_for_choices(split))
    else:
        table = read_table(query_table, "queries")
        population = table.select("query", "language", "count").unique(
            "query", keep="first", maintain_order=True
        )
    settings = SampleSettings(entity_type=entity_type, queries=count, k=k, seed=seed)
    sample = draw_sample(out, dataset, loaded, population, settings)
    write_sample(sample, dataset.images)
    say(
        f"wrote {out}: {sample.queries.height} of {population.height:,} queries,"
        f" {sample.items.height:,} items of {len(loaded)} systems. Next: omni judge page {out}"
        " --judge YOUR_NAME"
    )


def _load_systems(
    names: tuple[str, ...], data_dir: Path | None
) -> tuple[Dataset, dict[str, System]]:
    """Load bundles, baselines and stored results, and the data set that they search."""
    from encoders.datasets.dataset import load_dataset, load_sample
    from encoders.evaluation.baselines import default_cache, make_baseline
    from encoders.evaluation.report import bundle_system, engaged_depth
    from encoders.relevance.systems import read_results
    from encoders.towers.bundle import load_bundle

    bundles: list[ModelBundle] = []
    systems: dict[str, System] = {}
    for given in names:
        name, _, file = given.partition("=")
        system: System
        if file:
            system = read_results(Path(file))
        elif Path(given).is_dir():
            name = str(Path(given))
            bundles.append(load_bundle(Path(given)))
            system = bundle_system(bundles[-1])
        else:
            system = make_baseline(given, cache=default_cache())
        if name in systems:
            raise ConfigError(f"two systems are called {name!r}. Give each another name.")
        systems[name] = system
    depth = engaged_depth(bundles)
    if data_dir is None:
        return load_sample(engaged_queries=depth), systems
    return load_dataset(data_dir, engaged_queries=depth), systems


@group.command("page")
@sample_argument
@judge_option
@click.option(
    "--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder that paths in the column image start from.",
)
@click.option("--open/--no-open", "opens", default=False, help="Open the page in a browser.")
@handle_errors
def page(sample: Path, judge: str, port: int, images: Path | None, opens: bool) -> None:
    """Serve a page to this machine on which one person grades SAMPLE with the keyboard.

    Every grade is on the disk before it is answered; started again, the page goes on where it
    stopped. Ctrl-C ends it.

    Example: omni judge page judged --judge ann
    """
    from encoders.relevance.grades import GradeBook
    from encoders.relevance.page import JudgeServer
    from encoders.relevance.sample import load_sample_folder

    drawn = load_sample_folder(sample)
    with (
        GradeBook(drawn, judge, "person") as book,
        JudgeServer(drawn, book, port=port, images=images) as server,
    ):
        say(f"{server.address} shows {drawn.items.height:,} items; Ctrl-C ends it")
        if opens:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"{len(book.grades):,} of {drawn.items.height:,} items are graded")


@group.command("sheet")
@sample_argument
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Sheet to write (.csv)."
)
@handle_errors
def sheet(sample: Path, out: Path) -> None:
    """Write the items of SAMPLE as a sheet whose column grade a judge fills in.

    Example: omni judge sheet judged --out ann.csv
    """
    from encoders.relevance.grades import blank_sheet
    from encoders.relevance.sample import GRADES, load_sample_folder
    from encoders.tables.files import write_table

    write_table(blank_sheet(load_sample_folder(sample)), out)
    scale = ", ".join(f"{grade} {name}" for grade, name in enumerate(GRADES))
    say(f"wrote {out}; grades: {scale}. Then: omni judge add {sample} {out} --judge YOUR_NAME")


@group.command("add")
@sample_argument
@click.argument("table", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@judge_option
@handle_errors
def add(sample: Path, table: Path, judge: str) -> None:
    """Take the grades of a filled-in sheet into SAMPLE.

    Example: omni judge add judged ann.csv --judge ann
    """
    from encoders.relevance.grades import GradeBook, grades_of_sheet
    from encoders.relevance.sample import load_sample_folder
    from encoders.tables.files import read_raw

    drawn = load_sample_folder(sample)
    grades = grades_of_sheet(read_raw(table))
    with GradeBook(drawn, judge, "person") as book:
        book.save(grades)
        say(f"{judge}: {len(book.grades):,} of {drawn.items.height:,} items are graded")


@group.command("endpoint")
@sample_argument
@click.option("--url", required=True, help="Base address, e.g. https://api.example.com/v1.")
@click.option("--model", required=True, help="Name of the model at the endpoint.")
@click.option("--judge", help="Name of the judge. [default: the model's]")
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    show_default=True,
    help="Environment variable with the key; without it none is sent.",
)
@click.option(
    "--limit",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Most items to ask about in this run.",
)
@click.option(
    "--concurrency",
    default=4,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Questions at a time.",
)
@click.option(
    "--timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds to wait for an answer.",
)
@json_option
@handle_errors
def endpoint(
    sample: Path,
    url: str,
    model: str,
    judge: str | None,
    key_variable: str,
    limit: int,
    concurrency: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Let a language model grade SAMPLE by title and text, over OpenAI's chat completions.

    Overloaded endpoints are asked again; run the command again to go on where it stopped.

    Example: omni judge endpoint judged --url http://localhost:8000/v1 --model some-model
    """
    from encoders.relevance.endpoint import EndpointConfig, grade_by_endpoint
    from encoders.relevance.grades import GradeBook
    from encoders.relevance.sample import load_sample_folder

    config = EndpointConfig(
        url=url,
        model=model,
        key=os.environ.get(key_variable, ""),
        limit=limit,
        concurrency=concurrency,
        timeout_seconds=timeout,
    )
    drawn = load_sample_folder(sample)
    name = judge or model.replace("/", "-").replace(":", "-")[:64]
    with GradeBook(drawn, name, "model") as book:
        run = grade_by_endpoint(drawn, book, config)
    if as_json:
        print_json(run._asdict())
    else:
        print_table("", ["", "items"], run._asdict().items())


@group.command("oracle")
@sample_argument
@data_option
@handle_errors
def oracle(sample: Path, data_dir: Path | None) -> None:
    """Grade SAMPLE by the annotations of the data set: the highest grade if annotated, else 0.

    This is no judgement: what nobody annotated counts as wrong. Reports say so.

    Example: omni judge oracle judged
    """
    from encoders.datasets.dataset import load_dataset
    from encoders.relevance.grades import GradeBook, annotation_grades
    from encoders.relevance.sample import load_sample_folder

    drawn = load_sample_folder(sample)
    dataset = load_dataset(data_dir, engaged_queries=0)
    grades = annotation_grades(drawn, dataset.pairs, dataset.groups).to_list()
    with GradeBook(drawn, "annotations", "oracle") as book:
        book.save(dict(enumerate(grades, start=1)))
    say(f"annotations: {sum(grade > 0 for grade in grades):,} of {len(grades):,} items are right")


@group.command("report")
@sample_argument
@click.option(
    "--judge",
    "judges",
    multiple=True,
    help="Only this judge; may be repeated. [default: all but the oracle]",
)
@click.option(
    "--relevant-from",
    default=2,
    show_default=True,
    type=click.IntRange(1, 3),
    help="Lowest grade that counts as relevant.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write a table judgements: the mean grade of each item, rounded.",
)
@json_option
@handle_errors
def report(
    sample: Path, judges: tuple[str, ...], relevant_from: int, out: Path | None, as_json: bool
) -> None:
    """Say how relevant each system's results are, who is better, and how far judges agree.

    Lifts are of the first system over each other one, paired, with 95% intervals by bootstrap over
    queries; queries are weighted by what they stand for. A query counts when all its results are
    graded. Agreement is Krippendorff's alpha.

    Example: omni judge report judged
    """
    from encoders.relevance.grades import read_all_grades
    from encoders.relevance.report import (
        grades_to_report,
        merged_judgements,
        relevance_report,
    )
    from encoders.relevance.sample import load_sample_folder
    from encoders.tables.files import write_table

    drawn = load_sample_folder(sample)
    grades = grades_to_report(read_all_grades(drawn), judges)
    result = relevance_report(drawn, grades, relevant_from=relevant_from)
    if out:
        write_table(merged_judgements(drawn, grades), out)
        say(f"wrote {out}")
    if as_json:
        print_json(result.as_dict())
    else:
        _print_report(result)


def _print_report(report: RelevanceReport) -> None:
    about = report.about
    is_oracle = all(judge["kind"] == "oracle" for judge in report.judges)
    who = "annotations as oracle, not judgements" if is_oracle else "judged"
    standing = 100 * report.queries["weight"].sum() / about["population"]
    print_table(
        f"{about['entity_type']} of {about['dataset']}: {who}; {report.queries.height} queries"
        f" ({report.incomplete} incomplete left out) stand for {standing:.0f}% of"
        f" {about['population']:,}",
        ["system", f"relevant of {about['k']}", "95%", f"nDCG@{about['k']}", "95%"],
        [[system, *_cells(report, system)] for system in report.systems],
    )
    first, *others = report.systems
    rows = []
    for system in others:
        for measure, name in (("relevant", "relevant"), ("ndcg", "nDCG")):
            lift = report.lift(measure, first, system)  # type: ignore[arg-type]
            value, low, high = lift.difference.difference
            rows.append(
                [
                    system,
                    name,
                    f"{value:+.3f} [{low:+.3f}, {high:+.3f}]",
                    f"{lift.relative.value:+.1%} [{lift.relative.low:+.1%},"
                    f" {lift.relative.high:+.1%}]",
                    lift.minimum_detectable,
                    f"{lift.difference.wins} : {lift.difference.losses}",
                ]
            )
    columns = ["over", "measure", "difference", "lift", "detectable", "wins"]
    print_table(f"lift of {first}", columns, rows)
    strata = [
        [name, report.queries.filter(keep).height]
        + [report.value("relevant", system, keep).value for system in report.systems]
        for name, keep in report.strata().items()
    ]
    print_table("relevant by stratum", ["stratum", "queries", *report.systems], strata)
    _print_judges(report.judges, report.agreement)


def _cells(report: RelevanceReport, system: str) -> list[object]:
    cells: list[object] = []
    for measure in ("relevant", "ndcg"):
        value, low, high = report.value(measure, system)  # type: ignore[arg-type]
        cells += [value, f"{low:.3f}-{high:.3f}"]
    return cells


def _print_judges(judges: list[dict[str, Any]], agreement: Mapping[str, Any]) -> None:
    rows = [[j["judge"], j["kind"], j["grades"], *j["shares"].values()] for j in judges]
    print_table("judges", ["judge", "kind", "items", *judges[0]["shares"]], rows)
    if len(judges) > 1:
        print_table("agreement", ["", "value"], agreement.items())
