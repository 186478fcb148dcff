"""``omni rebuild``: embed, build, calibrate, gate and publish a release."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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
)
from encoders.errors import BundleError, ConfigError
from encoders.tables.schemas import ENTITY_TYPES
from index_builder.ann import AnnConfig
from index_builder.ann.choice import KINDS
from index_builder.ann.old_kinds import RENAMED_KINDS, RETIRED_KINDS
from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput, QuerySet, read_live
from index_builder.building.plan import (
    CALIBRATION_QUERIES,
    RebuildConfig,
    plan_release,
    read_bundle,
)
from index_builder.building.sources import (
    from_release,
    from_signals,
    read_query_texts,
    scratch_folder,
)
from index_builder.building.update import embed_again
from index_builder.commands.store_option import open_store, store_option
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig

_EMBED_ROUNDS = 8
"""Each round embeds what was written during the one before, so they get shorter."""
_SIZES = {"": 1 / 2**20, "k": 1 / 1024, "m": 1, "g": 1024, "t": 1024**2}


def parse_memory(text: str | None) -> int | None:
    """``4G``, ``800M`` or bytes as MiB.

    Raises:
        ConfigError: Not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"--max-memory must be a size such as 4G or 800M, but got {text!r}")
    return round(float(match.group(1)) * _SIZES[match.group(2)])


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
@store_option
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
    type=click.Choice(ENTITY_TYPES),
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
def command(store_path: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Embed, build, calibrate, gate and publish a release.

    What is active stays active until the new one is whole and proven.

    Give one source: --bundle with --catalogue (rows are embedded; unchanged rows are not embedded
    again), --bundle with --signals (add --catalogue for attributes), or --from-active (fold the
    live log in). An interrupted run goes on where it stopped when it is started again with the same
    input.

    With --query-tower nothing is embedded and no graph is built: a newer bundle's query tower takes
    over the indexes that are active, if `omni evaluate NEW --against-index OLD --declare` has
    measured and declared that it may. --dry-run shows the measured recall.

    Example: omni rebuild --store store --bundle bundle --catalogue catalogue.jsonl --queries
    queries.txt
    """
    store = open_store(store_path)
    config = _config(options)
    if options["query_tower"]:
        _upgrade_query_tower(store, options, config, dry_run, as_json)
        return
    with scratch_folder(store) as scratch:
        inputs, bundle_path, queries = _gather(store, options, config, scratch, dry_run)
        if dry_run:
            plan = plan_release(inputs, read_bundle(bundle_path), store, config)
            if as_json:
                print_json({"dry_run": True, **plan})
                return
            columns = (
                "entity type",
                "entities",
                "live upserts",
                "live deletes",
                "index",
                "peak MiB (est.)",
                "disk MiB (est.)",
            )
            rows = [
                (
                    name,
                    p["entities"],
                    p["live_upserts"],
                    p["live_deletes"],
                    p["index"],
                    p["peak_private_mib_estimate"],
                    p["disk_mib_estimate"],
                )
                for name, p in plan["build"].items()
            ]
            print_table(
                f"would build over {plan['parent'] or 'an empty store'}; taken over:"
                f" {', '.join(plan['carry']) or 'nothing'}",
                columns,
                rows,
            )
            return
        release_id = build_release(
            inputs,
            bundle_path,
            store,
            config,
            queries,
            parity=_parity_gate(bundle_path),
        )
    _report(store, release_id, as_json)


def _upgrade_query_tower(
    store: ReleaseStore,
    options: dict[str, Any],
    config: RebuildConfig,
    dry_run: bool,
    as_json: bool,
) -> None:
    """``--query-tower``: show what was declared, then publish unless this is a dry run."""
    from encoders.compatibility.declaration import load_adapter, require_declaration
    from index_builder.building.query_upgrade import upgrade_query_tower

    bundle: Path = options["query_tower"]
    others = [
        name
        for name in ("bundle", "catalogue", "signals", "from_active", "entity_types")
        if options[name]
    ]
    if others:
        raise ConfigError(
            "--query-tower keeps everything of the active release but its query tower: leave"
            f" --{others[0].replace('_', '-')} out. Usage: omni rebuild --store STORE --query-tower"
            " NEW --queries FILE"
        )
    current = store.current()
    if current is None:
        raise ConfigError(
            f"no release is active in {store.root}, so there are no indexes to keep. Build one with"
            " --bundle first."
        )
    declaration = require_declaration(
        bundle, read_manifest(store.path_of(current)).space_id, current
    )
    load_adapter(bundle, declaration)
    if dry_run and as_json:
        print_json(
            {
                "dry_run": True,
                "parent": current,
                "space_id": declaration.space_id,
                "measured": declaration.measured,
            }
        )
        return
    if not as_json:
        ways = ("recall@10", "low", "high", "overlap@10_with_old")
        rows = [
            (entity_type, way, *(figures.get(column) for column in ways))
            for entity_type, found in declaration.measured.items()
            for way, figures in found.items()
            if isinstance(figures, dict)
        ]
        title = (
            f"measured when {bundle.name} was declared compatible with space"
            f" {declaration.space_id[:16]} (labelled Recall@10, exact search)"
        )
        print_table(
            title,
            (
                "entity type",
                "way",
                "Recall@10",
                "95% low",
                "high",
                "top 10 shared with the old tower",
            ),
            rows,
        )
    if dry_run:
        return
    path: Path | None = options["queries"]
    texts = (
        read_query_texts(path, config.golden_queries + config.calibration_queries, config.seed)
        if path
        else []
    )
    _report(store, upgrade_query_tower(store, bundle, texts, config).release_id, as_json)


def _config(options: dict[str, Any]) -> RebuildConfig:
    import os

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
        release_id=options["release_id"],
        activate=not options["no_activate"],
        resume=not options["no_resume"],
        fold_live=not options["no_live"],
        drop_foreign_live=options["drop_foreign_live"],
        wait_seconds=options["wait"],
    )


def _gather(
    store: ReleaseStore,
    options: dict[str, Any],
    config: RebuildConfig,
    scratch: Path,
    dry_run: bool,
) -> tuple[dict[str, EntityInput], Path, dict[str, QuerySet] | None]:
    """Vectors, the bundle's folder and the queries, from whichever source was named."""
    entity_types: tuple[str, ...] = options["entity_types"]
    bundle_path: Path | None = options["bundle"]
    if options["from_active"]:
        if options["signals"] or options["catalogue"] or bundle_path:
            raise ConfigError(
                "--from-active takes everything from the active release: leave --bundle,"
                " --catalogue and --signals out"
            )
        with stage("read the active release"):
            inputs, bundle_path = from_release(store, entity_types)
    else:
        if bundle_path is None or not (options["catalogue"] or options["signals"]):
            raise ConfigError(
                "name a source: --bundle with --catalogue or --signals, or --from-active"
            )
        _check_bundle(bundle_path)
        catalogue = _catalogue(options["catalogue"], entity_types)
        signal_root = options["signals"]
        if signal_root is None:
            from encoders.towers.bundle import read_space_id

            assert catalogue is not None
            signal_root = store.root / "signals" / read_space_id(bundle_path)[:16]
            if dry_run:
                return _unembedded(catalogue, bundle_path), bundle_path, None
            with stage("embed the catalogue"):
                _embed(bundle_path, catalogue, signal_root)
            entity_types = entity_types or tuple(
                sorted(catalogue["entity_type"].unique().to_list())
            )
        from encoders.inference.signal_store import SignalStore

        with stage("read the signals"):
            inputs = from_signals(SignalStore(signal_root), entity_types, catalogue, scratch)
    if not dry_run:
        _embed_foreign_live(store, bundle_path, inputs, config)
    return inputs, bundle_path, _queries(options["queries"], bundle_path, config)


def _check_bundle(bundle_path: Path) -> None:
    """Refuse a bundle whose files no longer make its space id."""
    from encoders.towers.bundle import compute_space_id

    bundle = read_bundle(bundle_path)
    found = compute_space_id(bundle_path)
    if found != bundle.space_id:
        raise BundleError(
            f"{bundle_path}: the towers' files make space id {found[:16]}, but space.json says"
            f" {bundle.space_id[:16]}. A file was changed or cut short after saving: copy the"
            " bundle again."
        )


def _catalogue(paths: tuple[Path, ...], entity_types: tuple[str, ...]) -> pl.DataFrame | None:
    if not paths:
        return None
    from encoders.tables.files import check_table

    catalogue, _, report = check_table(paths[0] if len(paths) == 1 else paths, "catalogue")
    for note in report.notes:
        say(f"note: {note}")
    return (
        catalogue.filter(pl.col("entity_type").is_in(entity_types)) if entity_types else catalogue
    )


def _embed(bundle_path: Path, catalogue: pl.DataFrame, signal_root: Path) -> None:
    """Embed the rows whose inputs changed since the signal store was written."""
    from encoders.inference.batch_embedding import embed_catalogue
    from encoders.inference.signal_store import SignalStore
    from encoders.towers.bundle import load_bundle

    report = embed_catalogue(load_bundle(bundle_path), [catalogue], SignalStore(signal_root))
    for name, entity in report.entity_types.items():
        say(
            f"{name}: {entity.embedded:,} embedded, {entity.unchanged + entity.resumed:,} taken"
            " over"
        )
    for line in report.notes():
        say(line)


def _unembedded(catalogue: pl.DataFrame, bundle_path: Path) -> dict[str, EntityInput]:
    """What a dry run plans with: the ids, and zero vectors that take no memory."""
    bundle = read_bundle(bundle_path)
    nothing = np.zeros((1, bundle.dimension), np.float32)
    return {
        str(name): EntityInput(
            ids=rows["id"].to_list(),
            vectors=np.broadcast_to(nothing, (rows.height, bundle.dimension)),
            space_id=bundle.space_id,
        )
        for (name,), rows in catalogue.group_by("entity_type", maintain_order=True)
    }


def _queries(
    path: Path | None, bundle_path: Path, config: RebuildConfig
) -> dict[str, QuerySet] | None:
    if path is None:
        return None
    from encoders.towers.bundle import load_bundle

    with stage("embed the queries"):
        texts = read_query_texts(
            path,
            config.golden_queries + max(CALIBRATION_QUERIES, config.calibration_queries),
            config.seed,
        )
        vectors = load_bundle(bundle_path).embed_queries(texts)
        return {"*": QuerySet(texts, np.ascontiguousarray(vectors, np.float32))}


def _embed_foreign_live(
    store: ReleaseStore, bundle_path: Path, inputs: dict[str, EntityInput], config: RebuildConfig
) -> None:
    """Write live entities of another space again under this bundle's space, where they carry their catalogue row.

    That takes minutes, and writes go on: an entity written meanwhile keeps its newer entry, which
    is embedded in the next round.
    """
    if not config.fold_live:
        return
    bundle = read_bundle(bundle_path)
    for entity_type, entities in inputs.items():
        for _ in range(_EMBED_ROUNDS):
            live = read_live(store.live_root, entity_type, entities.base_watermark)
            foreign = [
                e
                for e in live.latest.values()
                if not e.is_delete and e.space_id != bundle.space_id and e.source
            ]
            if not foreign:
                break
            from encoders.towers.bundle import load_bundle

            with (
                stage(f"embed {len(foreign):,} live {entity_type} entities with the new bundle"),
                LiveLogWriter(
                    store.live_root, entity_type, bundle.dimension, after=entities.base_watermark
                ) as writer,
            ):
                writer.write_unless_changed(
                    embed_again(foreign, load_bundle(bundle_path)), since=live.watermark
                )


def _parity_gate(bundle_path: Path) -> Any:
    """The check of the export forms, where the bundle has any."""
    from index_builder.building.parity import check_forms

    return (
        check_forms
        if (bundle_path / "forms").is_dir() and any((bundle_path / "forms").iterdir())
        else None
    )


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
