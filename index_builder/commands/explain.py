"""``omni explain``: why was this id not returned, and where is labelled recall lost?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import polars as pl

from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)
from encoders.commands.entity_type import EntityTypeName
from encoders.errors import ConfigError, DataError
from index_builder.commands.explain_fused import (
    FusedReport,
    explain_fused,
    print_fused,
    print_leg_recall,
    weights_to_explain,
    why_fused,
)
from index_builder.commands.store_option import full_release_id, open_store, store_option
from index_builder.errors import InvalidQuery
from index_builder.fusion.explain_legs import LegRecall, leg_recall
from index_builder.releases.live_follower import LiveFollower
from index_builder.releases.release import Release
from index_builder.search.entity_index import EntityIndex, SearchOptions, SearchResult
from index_builder.search.explain import (
    STEPS,
    FreshVectors,
    LabelledPairs,
    Waterfall,
    dimension_curve,
    explain_id,
    recall_waterfall,
)

if TYPE_CHECKING:
    from encoders.towers.query_tower import QueryEncoder

DIMENSIONS = (16, 32, 64, 128, 256, 512)
"""Prefix lengths whose recall is shown."""
_CEILING, _LOSS, _GAIN = "#999", "#c44", "#4a4"


@click.group()
def group() -> None:
    """Why was this id not returned? Where is recall lost?

    Example: omni explain query --entity-type pin --text "red heart" --id fluent:heart --store store
    """


def _open(store_path: Path, release_id: str | None) -> tuple[Release, LiveFollower]:
    store = open_store(store_path)
    release = store.open(full_release_id(store, release_id)) if release_id else store.open_current()
    follower = LiveFollower(store, release)
    follower.catch_up()
    return release, follower


@group.command("query")
@store_option
@click.option("--entity-type", required=True, type=EntityTypeName(), help="Which index.")
@click.option("--text", help="The query.")
@click.option("--like", "like_id", help="Use the vector of this id as the query: its neighbours.")
@click.option(
    "--id", "wanted", multiple=True, help="Say why this id is (not) among the answers. Repeatable."
)
@click.option("--filter", "expression", help="Filter of the search.")
@click.option("--k", type=int, default=10, show_default=True, help="Number of answers.")
@click.option(
    "--fused/--no-fused",
    "is_fused",
    default=None,
    help="Show each leg's rank and share of the fused answer. [default: the release decides]",
)
@click.option("--release", "release_id", help="Default: the active release.")
@json_option
@handle_errors
def query_command(
    store_path: Path,
    entity_type: str,
    text: str | None,
    like_id: str | None,
    wanted: tuple[str, ...],
    expression: str | None,
    k: int,
    is_fused: bool | None,
    release_id: str | None,
    as_json: bool,
) -> None:
    """Show the answers of a query beside exact search, and why an id is not among them.

    The query is a text, or the vector of an id, whose neighbours are shown. Of a fused answer the
    rank of each hit in each leg is shown, and the part of its score that comes from there.

    Example: omni explain query --entity-type pin --like fluent:heart --id fluent:broken-heart
    --store store
    """
    if (text is None) == (like_id is None):
        raise ConfigError("give either --text or --like")
    release, _ = _open(store_path, release_id)
    index = release.entity(entity_type)
    query = _encoded(release, text) if text is not None else _vector_of(index, str(like_id))
    weights = weights_to_explain(release.fused[entity_type], is_fused)
    report = None
    if weights is not None:
        fused = release.fused[entity_type]
        options: SearchOptions = {} if expression is None else {"filter": expression}
        report = explain_fused(fused, fused.query(text or "", query), weights, options, k)
    served = index.search(query, k, filter=expression)
    exact = index.search(query, k, filter=expression, exact=True)
    verdicts = [
        asdict(explain_id(index, query, identifier, k, expression))
        | {"fused": _fused_verdict(report, identifier, k)}
        for identifier in wanted
    ]
    release.close()
    if as_json:
        scored = zip(served.ids, served.scores)
        print_json(
            {
                "release_id": release.release_id,
                "plan": served.plan,
                "ef": served.ef,
                "estimated_recall": served.estimated_recall,
                "selectivity": served.selectivity,
                "answers": [{"id": i, "score": round(float(s), 6)} for i, s in scored],
                "exact": exact.ids,
                "why": verdicts,
                "fused": None if report is None else report.as_dict(k),
            }
        )
        return
    say(
        f"release {release.release_id}, plan {served.plan}, ef {served.ef}, estimated recall"
        f" {served.estimated_recall}, selectivity {served.selectivity}"
    )
    caption = f"answers of {text or like_id!r}"
    if report is not None:
        print_fused(f"fused {caption}", report, release.fused[entity_type], k)
        caption += " by vectors alone"
    _print_answers(caption, index, served, exact)
    for verdict in verdicts:
        if verdict["fused"] is not None:
            click.echo(f"{verdict['id']}: {verdict['fused']}")
        click.echo(
            f"{verdict['id']}: {verdict['reason']} [{verdict['state']}, score {verdict['score']},"
            f" exact rank {verdict['exact_rank']}]"
        )


def _fused_verdict(report: FusedReport | None, identifier: str, k: int) -> str | None:
    """Say where an id stands in the fused answer; None where answers are by vectors alone."""
    if report is None:
        return None
    return why_fused(report, identifier, k) or "no leg has it among its best"


def _vector_of(index: EntityIndex, identifier: str) -> np.ndarray:
    vector = index.vector(identifier)
    if vector is None:
        raise InvalidQuery(
            f"{identifier!r} is not in the {index.entity_type} index; choose an id that is (omni"
            " explain query --text ...)"
        )
    return np.ascontiguousarray(vector, np.float32)


def _encoded(release: Release, text: str) -> np.ndarray:
    from encoders.towers.query_tower import QueryEncoder

    tower = QueryEncoder.load(release.query_encoder_path)
    return np.asarray(tower.encode([text])[0], np.float32)


def _print_answers(
    caption: str, index: EntityIndex, served: SearchResult, exact: SearchResult
) -> None:
    ranks = {identifier: rank + 1 for rank, identifier in enumerate(exact.ids)}
    titles: list[Any] = [None] * len(served.ids)
    if "title" in index.attribute_table.schema:
        titles = [row.get("title") for row in index.attributes(served.ids, ["title"])]
    rows = [
        (place + 1, id_, round(float(score), 4), ranks.get(id_), title)
        for place, (id_, score, title) in enumerate(zip(served.ids, served.scores, titles))
    ]
    print_table(caption, ("rank", "id", "score", "exact rank", "title"), rows)


@group.command("misses")
@store_option
@click.option(
    "--pairs",
    "pairs_path",
    type=click.Path(path_type=Path, exists=True),
    help="Labelled pairs: a table with query, entity_type, entity_id (and split, filter).",
)
@data_option
@click.option(
    "--split",
    default="dev",
    show_default=True,
    help="Which split, where the pairs have one; dev: half of the held-out queries.",
)
@click.option(
    "--limit",
    type=int,
    default=2000,
    show_default=True,
    help="Pairs per entity type, drawn at random.",
)
@click.option(
    "--signals",
    type=click.Path(path_type=Path, file_okay=False),
    help="Signal store with today's vectors: separates staleness from the encoder.",
)
@click.option(
    "--filter",
    "expression",
    help="Filter of every query (pairs may bring their own in a column filter).",
)
@click.option("--k", type=int, default=10, show_default=True, help="Depth of labelled Recall@k.")
@click.option("--release", "release_id", help="Default: the active release.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the waterfall as an image (.png, .svg).",
)
@json_option
@handle_errors
def misses_command(
    store_path: Path,
    pairs_path: Path | None,
    data_dir: Path | None,
    split: str,
    limit: int,
    signals: Path | None,
    expression: str | None,
    k: int,
    release_id: str | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Show to which step each labelled pair that is not found was lost.

    The steps are the labels (queries with more labelled entities than answers), the encoder, the
    dimension cut, staleness, quantisation, the graph and the filter; each is compared with its
    exact oracle. Where answers can be fused, a table says what each leg finds. Without --pairs and
    --data the sample data's held-out pairs are used.

    Example: omni explain misses --store store --limit 500 --plot waterfall.png
    """
    from encoders.towers.query_tower import QueryEncoder

    pairs = _pairs(pairs_path, data_dir, split)
    release, _ = _open(store_path, release_id)
    _require_held(pairs, release, _source(pairs_path, data_dir, split))
    tower = QueryEncoder.load(release.query_encoder_path)
    waterfalls: list[Waterfall] = []
    by_leg: list[LegRecall] = []
    curves: dict[str, Any] = {}
    for entity_type, index in release.entities.items():
        drawn = _labelled(pairs, entity_type, limit, expression, tower)
        if drawn is None:
            continue
        texts, labelled = drawn
        say(
            f"{entity_type}: {len(labelled.targets):,} labelled pairs over {index.count:,} entities"
        )
        fresh = _fresh(signals, entity_type, release)
        waterfalls.append(recall_waterfall(index, labelled, k=k, fresh=fresh))
        curves[entity_type] = dimension_curve(index, labelled, k, DIMENSIONS)
        fusion = release.fused[entity_type].fusion
        if fusion is not None:
            legs = release.fused[entity_type]
            by_leg.append(leg_recall(legs, texts, labelled, fusion.weights, k))
    release.close()
    if plot_path is not None:
        plot_waterfalls(waterfalls, plot_path)
    if as_json:
        print_json(
            {
                "release_id": release.release_id,
                "waterfalls": [asdict(w) for w in waterfalls],
                "recall_by_dimension": curves,
                "legs": [asdict(found) for found in by_leg],
            }
        )
        return
    _print(waterfalls, curves, k)
    print_leg_recall(by_leg)


def _labelled(
    pairs: pl.DataFrame, entity_type: str, limit: int, expression: str | None, tower: QueryEncoder
) -> tuple[list[str], LabelledPairs] | None:
    """Draw pairs of one entity type and embed their queries; None where there are none.

    Returns:
        The query of each pair, and the pairs.
    """
    rows = pairs.filter(pl.col("entity_type") == entity_type)
    if not rows.height:
        return None
    rows = rows.with_columns(pl.col("entity_id").n_unique().over("query").alias("positives"))
    rows = rows.sample(min(limit, rows.height), seed=0, shuffle=True)
    texts = rows["query"].to_list()
    distinct = list(dict.fromkeys(texts))
    encoded = dict(zip(distinct, np.asarray(tower.encode(distinct), np.float32)))
    filters = rows["filter"].to_list() if "filter" in rows.columns else None
    labelled = LabelledPairs(
        queries=np.stack([encoded[text] for text in texts]),
        targets=rows["entity_id"].to_list(),
        filters=filters or ([expression] * len(texts) if expression else None),
        positives=rows["positives"].to_list(),
    )
    return texts, labelled


def _pairs(path: Path | None, data_dir: Path | None, split: str) -> pl.DataFrame:
    from encoders.datasets.halves import rows_of_split, split_for_choices

    if path is not None:
        from encoders.tables.files import read_whole_table

        frame = read_whole_table(path)
        missing = {"query", "entity_type", "entity_id"} - set(frame.columns)
        if missing:
            raise DataError(
                f"{path}: expected columns query, entity_type, entity_id, but"
                f" {', '.join(sorted(missing))} is missing"
            )
        frame = frame.with_columns(pl.col("entity_id").cast(pl.String))
        return rows_of_split(frame, split_for_choices(split)) if "split" in frame.columns else frame
    from encoders.datasets.dataset import load_dataset

    return load_dataset(data_dir).split(split_for_choices(split))


def _source(path: Path | None, data_dir: Path | None, split: str) -> str:
    """Return where ``_pairs`` read, for messages."""
    if path is not None:
        return str(path)
    return f"{data_dir or 'the sample data in the package'} (split {split!r})"


def _require_held(pairs: pl.DataFrame, release: Release, source: str) -> None:
    """Refuse pairs of which none labels an entity of the release; note the types where most do not.

    Live entries count as held.

    Raises:
        DataError: The pairs belong to another catalogue.
    """
    held, notes = 0, []
    for entity_type, index in release.entities.items():
        targets = pairs.filter(pl.col("entity_type") == entity_type)["entity_id"].fill_null("")
        unknown = [
            id
            for id in targets.unique(maintain_order=True)
            if index.row_of(id) is None and index.vector(id) is None
        ]
        lost = int(targets.is_in(unknown).sum())
        held += len(targets) - lost
        if lost > len(targets) / 2:
            notes.append(
                f"note: {entity_type}: {lost:,} of {len(targets):,} pairs label entities that"
                f" release {release.release_id} does not hold, e.g. {unknown[0]!r}: no step could"
                " find them, whichever they are counted for"
            )
    if not held:
        named = f", e.g. {pairs['entity_id'][0]!r}" if pairs.height else ""
        raise DataError(
            f"none of the {pairs.height:,} pairs of {source} labels an entity of release"
            f" {release.release_id}{named}. It holds"
            f" {', '.join(_shown(index) for index in release.entities.values())}. Name pairs of"
            " that catalogue: --pairs FILE (query, entity_type, entity_id), or --data FOLDER with"
            " its tables catalogue and pairs"
        )
    for note in notes:
        say(note)


def _shown(index: EntityIndex) -> str:
    first = index.ids.take(np.arange(min(1, len(index.ids))))
    return f"{index.entity_type} {index.count:,}" + (f" (e.g. {first[0]!r})" if first else "")


def _fresh(signals: Path | None, entity_type: str, release: Release) -> FreshVectors | None:
    if signals is None:
        return None
    from encoders.errors import SpaceMismatch
    from encoders.inference.signal_store import SignalStore

    found = SignalStore(signals).read(entity_type)
    if found.space_id != release.space_id:
        raise SpaceMismatch(release.space_id, found.space_id, f"signals of {entity_type!r}")
    return FreshVectors(found.ids, found.vectors)


def _print(waterfalls: list[Waterfall], curves: dict[str, Any], k: int) -> None:
    rows = []
    for w in waterfalls:
        before = 1.0
        for step in STEPS:
            after = w.recall[step]
            rows.append(
                (
                    w.entity_type,
                    step,
                    round(after, 4),
                    round(before - after, 4),
                    w.lost_to[step],
                    "" if w.measured[step] else "not in play",
                )
            )
            before = after
    columns = ("entity type", "step", f"labelled Recall@{k} after", "lost", "pairs lost to it", "")
    print_table("where labelled pairs are lost (each step against its exact oracle)", columns, rows)
    table = [(name, d, round(r, 4)) for name, curve in curves.items() for d, r in curve.items()]
    print_table(
        "what fewer dimensions would cost (exact search over prefixes)",
        ("entity type", "dimensions", f"labelled Recall@{k}"),
        table,
    )


def plot_waterfalls(waterfalls: list[Waterfall], path: Path) -> None:
    """Draw labelled Recall after every step, one panel per entity type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(waterfalls), figsize=(4.2 * len(waterfalls), 3.6), sharey=True, squeeze=False
    )
    for axis, w in zip(axes[0], waterfalls):
        before = 1.0
        for position, step in enumerate(STEPS):
            after = w.recall[step]
            colour = _LOSS if after <= before else _GAIN
            if step == "labels":
                colour = _CEILING
            axis.bar(
                position, abs(before - after), bottom=min(before, after), color=colour, width=0.7
            )
            note = f"{after - before:+.3f}" if w.measured[step] else "not in play"
            axis.text(
                position,
                max(before, after) + 0.01,
                note,
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7,
            )
            axis.plot(
                [position - 0.35, position + 1.35], [after, after], color="#888", linewidth=0.8
            )
            before = after
        axis.bar(len(STEPS), before, color="#357", width=0.7)
        axis.text(len(STEPS), before + 0.01, f"{before:.3f}", ha="center", fontsize=8)
        axis.set_xticks(
            range(len(STEPS) + 1), [*STEPS, "found"], rotation=45, ha="right", fontsize=8
        )
        axis.set_title(f"{w.entity_type}: {w.pairs:,} labelled pairs", fontsize=10)
        axis.set_ylim(0, 1.2)
    axes[0][0].set_ylabel(f"labelled Recall@{waterfalls[0].k}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
