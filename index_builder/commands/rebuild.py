"""``omni rebuild``: embed, build, calibrate, gate and publish a release."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import (
    handle_errors,
    json_option,
    peak_memory_mib,
    print_json,
    print_table,
    say,
)
from encoders.commands.entity_type import EntityTypeName
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError
from encoders.tables.reading_options import ReadingOptions
from index_builder.ann import AnnConfig
from index_builder.ann.choice import KINDS
from index_builder.ann.old_kinds import RENAMED_KINDS, RETIRED_KINDS
from index_builder.building.build import ParityGate, build_release
from index_builder.building.catalogue_age import parse_exported_at
from index_builder.building.order import some_ids
from index_builder.building.parity import check_forms
from index_builder.building.plan import RebuildConfig, plan_release, read_bundle
from index_builder.building.sources import scratch_folder
from index_builder.commands.rebuild_sources import RebuildSources, gather
from index_builder.commands.store_option import StoreOrUrl, open_store
from index_builder.releases.manifest import Manifest
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.construction import INCREMENTAL
from index_builder.search.entity_index import IndexConfig

if TYPE_CHECKING:
    from index_builder.commands.rebuild_remote import RemoteTarget

_SOURCES = (
    "bundle",
    "catalogue",
    "signals",
    "from_active",
    "entity_types",
    "queries",
    "pairs",
    "state",
    "min_query_users",
    "fusion_weights",
)
_EXCLUDED_BY_QUERY_TOWER = (
    "bundle",
    "catalogue",
    "signals",
    "from_active",
    "entity_types",
    "pairs",
    "state",
    "exported_at",
)
_PLANNED = {
    "entities": "entities",
    "live_upserts": "live upserts",
    "live_deletes": "live deletes",
    "index": "index",
    "peak_private_mib_estimate": "peak MiB (est.)",
    "disk_mib_estimate": "disk MiB (est.)",
}
"""Field of the plan -> column of its table."""
_SIZES = {"": 1 / 2**20, "k": 1 / 1024, "m": 1, "g": 1024, "t": 1024**2}


def parse_memory(text: str | None) -> int | None:
    """Parse a size (``4G``, ``800M`` or bytes) as MiB.

    Raises:
        ConfigError: Not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"--max-memory must be a size such as 4G or 800M, but got {text!r}")
    return round(float(match.group(1)) * _SIZES[match.group(2)])


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Parse the weights of two or three legs.

    Raises:
        BadParameter: They are no such numbers.
    """
    if text is None:
        return None
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if (
        len(weights) not in (2, 3)
        or not all(0 <= w < math.inf for w in weights)
        or not any(weights)
    ):
        raise click.BadParameter(
            f"expected two or three numbers of at least 0, for example 1,0.5, got {text!r}"
        )
    return weights


class IndexKind(click.Choice):
    """Kinds of index; an earlier version's name is accepted, or refused with what to use now."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one value."""
        if value in RENAMED_KINDS:
            return value
        if value in RETIRED_KINDS:
            self.fail(f"{value!r} is retired: use {RETIRED_KINDS[value]}.", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@click.option(
    "--store",
    type=StoreOrUrl(path_type=Path, file_okay=False),
    envvar="OMNI_STORE",
    default=Path("store"),
    show_default=True,
    help=(
        "Folder with releases/ and live/ (also read from OMNI_STORE), or the URL of pushed"
        " releases: the active one is pulled, the new one is built over it and pushed."
    ),
)
@click.option(
    "--store-cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder in which releases of --store URL are built; by default one below ~/.cache.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, file_okay=False),
    help="Model bundle (towers, space id). With --from-active: not needed.",
)
@click.option(
    "--catalogue",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help=(
        "Catalogue file or folder: embedded with the bundle; its columns become attributes."
        " Repeatable: all together are one table."
    ),
)
@click.option(
    "--signals",
    type=click.Path(path_type=Path, file_okay=False),
    help="Signal store with ready embeddings, as `omni embed` writes it.",
)
@click.option(
    "--from-active",
    is_flag=True,
    help="Take vectors and attributes from the active release and fold the live log into them.",
)
@click.option(
    "--exported-at",
    metavar="TIME",
    help=(
        "When the catalogue was current: an ISO 8601 time, or `file` for its files' own time. Live"
        " writes before it lose to the catalogue, deletes too; a column modified_at says it row by"
        " row."
    ),
)
@click.option(
    "--max-overridden",
    type=float,
    default=0.1,
    show_default=True,
    help=(
        "Live writes that a newer catalogue may undo, as a share of its rows (a hundred always"
        " may); more stop the rebuild."
    ),
)
@click.option(
    "--max-shrink",
    type=float,
    default=0.5,
    show_default=True,
    help=(
        "Share of the active release's entities of one type that a catalogue may lack; an export"
        " that lost more stops the rebuild."
    ),
)
@click.option(
    "--query-tower",
    type=click.Path(path_type=Path, file_okay=False),
    help=(
        "Keep the active release's indexes and search them with this bundle's query tower, which"
        " declares itself compatible."
    ),
)
@click.option(
    "--entity-type",
    "entity_types",
    multiple=True,
    type=EntityTypeName(),
    help="Only these; the others are taken over. Repeatable.",
)
@click.option(
    "--queries",
    type=click.Path(path_type=Path, exists=True),
    help=(
        "Real queries (.txt, or a table with a column query) to calibrate and prove the release"
        " with."
    ),
)
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, exists=True),
    help=(
        "Pairs for fused answers: queries of train pairs that are in the index of queries vote for"
        " their entities; those of split validation (else the dev half of held-out ones) fit the"
        " weights and prove the gain."
    ),
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=(
        "State of `omni enrich queries`: its queries vote instead of the train pairs of --pairs;"
        " deleted users and queries do not."
    ),
)
@click.option(
    "--fusion-weights",
    metavar="DENSE,LEXICAL[,VOTES]",
    callback=lambda context, parameter, value: parse_weights(value),
    help="Fuse answers by these weights where fewer than 100 queries fit them, e.g. 1,0.5.",
)
@click.option(
    "--min-query-users",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Queries of fewer users do not vote, where the pairs have a column users, or by --state.",
)
@click.option(
    "--index",
    "kind",
    type=IndexKind(["auto", *KINDS]),
    default="auto",
    show_default=True,
    help="Kind of index; auto says why.",
)
@click.option(
    "--low-memory",
    "--lean",
    "low_memory",
    is_flag=True,
    help="Let auto prefer little memory over speed (--lean is its old name).",
)
@click.option(
    "--sketched-links/--no-sketched-links",
    default=True,
    show_default=True,
    help="int8-graph: links carry one-bit sketches; faster, 1.5 instead of 0.4 kB a vector.",
)
@click.option(
    "--m",
    type=int,
    default=16,
    show_default=True,
    help="HNSW links per node: more is better recall and more memory.",
)
@click.option(
    "--ef-construction",
    type=int,
    default=200,
    show_default=True,
    help="Candidates while inserting: more is better recall and a slower build.",
)
@click.option(
    "--degree",
    type=int,
    default=32,
    show_default=True,
    help="SymphonyQG out-degree, a multiple of 32.",
)
@click.option(
    "--bits",
    type=int,
    default=0,
    show_default=True,
    help="0: re-rank with float32; 8: with 8 bits a dimension (symqg).",
)
@click.option(
    "--threads",
    type=int,
    default=0,
    help="Build threads; 0: all cores (fast mode). Deterministic mode uses one.",
)
@click.option(
    "--deterministic", is_flag=True, help="Same input and seed give the same bytes; one thread."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of every random choice.")
@click.option(
    "--min-recall",
    type=float,
    default=0.95,
    show_default=True,
    help="Gate: lower 95% bound of the measured ANN recall@10.",
)
@click.option(
    "--golden",
    type=int,
    default=64,
    show_default=True,
    help="Golden queries kept per entity type, replayed before a server is READY.",
)
@click.option(
    "--max-memory",
    help=(
        "Private memory at the peak, e.g. 4G: kinds that do not fit are not chosen, and the"
        " measured peak is gated."
    ),
)
@click.option("--release-id", help="Default: time and content; in deterministic mode content only.")
@click.option("--no-activate", is_flag=True, help="Publish without making it the active release.")
@click.option(
    "--no-resume",
    is_flag=True,
    help="Start over instead of taking over what an interrupted run left.",
)
@click.option(
    "--full",
    is_flag=True,
    help=(
        "Build every graph from nothing. Else a graph of the active release is carried over where"
        " at most a fifth of its vectors changed since it was built in full (int8-graph, and auto"
        " instead of symqg; never with --deterministic)."
    ),
)
@click.option(
    "--no-live", is_flag=True, help="Leave the live log alone; it is replayed over the new release."
)
@click.option(
    "--drop-foreign-live",
    is_flag=True,
    help="Leave out live entries that only exist as vectors of another space.",
)
@click.option(
    "--wait",
    type=float,
    default=0.0,
    show_default=True,
    help="Seconds to wait for another rebuild in the same store.",
)
@click.option("--dry-run", is_flag=True, help="Check the input and print the plan; build nothing.")
@json_option
@handle_errors
@reading_flags
def command(as_json: bool, dry_run: bool, reading: ReadingOptions, **options: Any) -> None:
    """Embed, build, calibrate, gate and publish a release.

    What is active stays active until the new one is whole and proven.

    Give one source: --bundle with --catalogue (rows are embedded; unchanged rows are not embedded
    again), --bundle with --signals (add --catalogue for attributes), or --from-active (fold the
    live log in). An interrupted run goes on where it stopped when it is started again with the same
    input.

    With --store URL the release that is active there is pulled, the new one is built over it in a
    cache folder, and pushed once it is proven; live writes are not folded in, as a URL has none.

    With --query-tower nothing is embedded and no graph is built: a newer bundle's query tower takes
    over the indexes that are active, if `omni evaluate NEW --against-index OLD --declare` has
    measured and declared that it may. --dry-run shows the measured recall.

    Example: omni rebuild --store store --bundle bundle --catalogue catalogue.jsonl --queries
    queries.txt
    """
    config = _config(options)
    target = _remote_target(options["store"], options["store_cache"])
    store = open_store(options["store"]) if target is None else target.store
    # What is built for a URL becomes active once it is there
    building = config if target is None else replace(config, activate=False)
    if options["query_tower"]:
        release_id = _upgrade_query_tower(store, options, building, dry_run, as_json)
    else:
        sources = RebuildSources(
            **{name: options[name] for name in _SOURCES},
            reading=reading,
            exported_at=parse_exported_at(options["exported_at"]),
        )
        release_id = _rebuild(store, sources, building, dry_run, as_json)
    if release_id is None:
        return
    if target is not None:
        target.push(release_id, config.activate)
    _report(store, release_id, as_json)


def _remote_target(store: Path | str, cache: Path | None) -> RemoteTarget | None:
    """Prepare a build for a store at a URL; None: the store is a folder.

    Raises:
        ConfigError: There is a cache folder, and no URL.
    """
    if isinstance(store, str):
        from index_builder.commands.rebuild_remote import open_target

        return open_target(store, cache)
    if cache is not None:
        raise ConfigError("--store-cache: expected a URL as --store, but got a folder")
    return None


def _rebuild(
    store: ReleaseStore,
    sources: RebuildSources,
    config: RebuildConfig,
    dry_run: bool,
    as_json: bool,
) -> str | None:
    """Build and publish a release; None if this is a dry run, which prints its plan."""
    with scratch_folder(store) as scratch:
        inputs, bundle_path, queries = gather(store, sources, config, scratch, dry_run)
        if dry_run:
            _print_plan(plan_release(inputs, read_bundle(bundle_path), store, config), as_json)
            return None
        gate = _parity_gate(bundle_path)
        return build_release(inputs, bundle_path, store, config, queries, parity=gate)


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": True, **plan})
        return
    rows = [(name, *(entity[key] for key in _PLANNED)) for name, entity in plan["build"].items()]
    for name, entity in plan["build"].items():
        for what in ("overridden", "relisted", "dropped", "held_back"):
            if ids := entity["live"][what]:
                say(f"{name}: {what.replace('_', ' ')}: {some_ids(ids)}")
    title = (
        f"would build over {plan['parent'] or 'an empty store'}; taken over:"
        f" {', '.join(plan['carry']) or 'nothing'}"
    )
    print_table(title, ("entity type", *_PLANNED.values()), rows)


def _upgrade_query_tower(
    store: ReleaseStore,
    options: dict[str, Any],
    config: RebuildConfig,
    dry_run: bool,
    as_json: bool,
) -> str | None:
    """Show what was declared, then publish; None if this is a dry run."""
    from index_builder.commands import query_tower

    others = [name for name in _EXCLUDED_BY_QUERY_TOWER if options[name]]
    if others:
        raise ConfigError(
            "--query-tower keeps everything of the active release but its query tower: leave"
            f" --{others[0].replace('_', '-')} out. Usage: omni rebuild --store STORE --query-tower"
            " NEW --queries FILE"
        )
    bundle: Path = options["query_tower"]
    current, declaration = query_tower.declared_upgrade(store, bundle)
    if not as_json:
        query_tower.print_declared(bundle, declaration)
    elif dry_run:
        query_tower.print_declared_json(current, declaration)
    if dry_run:
        return None
    return query_tower.upgrade(store, bundle, options["queries"], config)


def _config(options: dict[str, Any]) -> RebuildConfig:
    deterministic = bool(options["deterministic"])
    threads = 1 if deterministic else (options["threads"] or os.cpu_count() or 1)
    ann = AnnConfig(
        m=options["m"],
        degree=options["degree"],
        ef_construction=options["ef_construction"],
        bits=options["bits"],
        sketched_links=options["sketched_links"],
        threads=threads,
        seed=options["seed"] + 100,
    )
    return RebuildConfig(
        index=IndexConfig(
            kind=options["kind"],
            ann=ann,
            low_memory=options["low_memory"],
            deterministic=deterministic,
            default_recall=min(options["min_recall"], 0.999),
        ),
        min_recall=options["min_recall"],
        golden_queries=options["golden"],
        deterministic=deterministic,
        seed=options["seed"],
        max_memory_mib=parse_memory(options["max_memory"]),
        incremental=not options["full"],
        release_id=options["release_id"],
        activate=not options["no_activate"],
        resume=not options["no_resume"],
        fold_live=not options["no_live"],
        drop_foreign_live=options["drop_foreign_live"],
        max_overridden=options["max_overridden"],
        max_shrink=options["max_shrink"],
        wait_seconds=options["wait"],
    )


def _parity_gate(bundle_path: Path) -> ParityGate | None:
    """Return the check of the export forms, where the bundle has any."""
    forms = bundle_path / "forms"
    return check_forms if forms.is_dir() and any(forms.iterdir()) else None


def _measured(manifest: Manifest, entity_type: str, what: str) -> dict[str, Any] | None:
    """Return what was recorded of the build of a type; None where it was taken over."""
    measured: dict[str, dict[str, Any]] = manifest.measured.get("entities", {})
    return measured.get(entity_type, {}).get(what)


def _report(store: ReleaseStore, release_id: str, as_json: bool) -> None:
    manifest = read_manifest(store.path_of(release_id))
    if as_json:
        print_json(
            {
                "release_id": release_id,
                "active": store.current() == release_id,
                "space_id": manifest.space_id,
                "entities": {
                    name: {
                        "count": e.count,
                        "watermark": e.watermark,
                        "kind": e.index.get("kind"),
                        "golden": e.golden,
                        "carried_from": e.carried_from,
                        "live": _measured(manifest, name, "live"),
                        INCREMENTAL: _measured(manifest, name, INCREMENTAL),
                    }
                    for name, e in manifest.entities.items()
                },
                "bytes": manifest.total_bytes(),
                "measured": {k: v for k, v in manifest.measured.items() if k != "entities"},
                "command_peak_resident_mib": round(peak_memory_mib(), 1),
            }
        )
        return
    rows = [
        (
            name,
            e.count,
            e.index.get("kind"),
            e.golden.get("recall"),
            e.golden.get("kind"),
            e.watermark,
            e.carried_from or "built",
        )
        for name, e in manifest.entities.items()
    ]
    print_table(
        f"release {release_id}: {manifest.total_bytes() / 2**20:,.1f} MiB, built in"
        f" {manifest.measured['seconds']['total']:.1f} s, peak"
        f" {manifest.measured['peak_private_mib']:,.0f} MiB private",
        (
            "entity type",
            "entities",
            "index",
            "golden recall@10",
            "golden queries",
            "watermark",
            "from",
        ),
        rows,
    )
    for name, entity in manifest.entities.items():
        say(f"{name}: {entity.index.get('kind')}: {entity.index.get('why')}")
