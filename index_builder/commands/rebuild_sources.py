"""What ``omni rebuild`` builds from: the sources that its options name, read or embedded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl

from encoders.commands.console import say, stage
from encoders.errors import BundleError, ConfigError
from encoders.inference.signal_store import SignalStore
from encoders.tables.reading import DEFAULT_OPTIONS
from encoders.tables.reading_options import ReadingOptions
from index_builder.building.catalogue_age import ExportedAt, SourceTimes
from index_builder.building.fusion_build import with_engagements, with_weights
from index_builder.building.inputs import EntityInput, QuerySet
from index_builder.building.order import decide
from index_builder.building.plan import (
    CALIBRATION_QUERIES,
    RebuildConfig,
    read_bundle,
    writes_for,
)
from index_builder.building.sources import (
    attributes_for,
    from_release,
    from_signals,
    read_query_texts,
)
from index_builder.building.update import embed_again
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.store import ReleaseStore

if TYPE_CHECKING:
    from encoders.towers.bundle import ModelBundle

_LEARNED_FROM = 0.01
"""Share of rows with a value from which on towers are said to have learned from a field."""
_EMBED_ROUNDS = 8
"""Each round embeds what was written during the one before, so they get shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuildSources:
    """Where vectors, attributes and queries come from.

    Attributes:
        bundle: Model bundle; None with ``from_active``.
        catalogue: Tables to embed, or whose columns become attributes of ``signals``.
        signals: Signal store with ready embeddings.
        from_active: Take everything from the active release.
        entity_types: Only these; empty: all there are.
        queries: Real queries to calibrate and prove with.
        pairs: Table of pairs: train pairs vote, those of split ``validation`` fit the weights.
        state: State of engaged queries, which vote instead of the train pairs.
        fusion_weights: Of the legs, where too few queries fit them.
        min_query_users: Queries of fewer users do not vote, where the table counts ``users``.
        reading: How the catalogue's files are written.
        exported_at: When the catalogue was current, as ``--exported-at`` says.
    """

    bundle: Path | None
    catalogue: tuple[Path, ...]
    signals: Path | None
    from_active: bool
    entity_types: tuple[str, ...]
    queries: Path | None
    pairs: Path | None = None
    state: Path | None = None
    min_query_users: int = 3
    fusion_weights: tuple[float, ...] | None = None
    reading: ReadingOptions = DEFAULT_OPTIONS
    exported_at: ExportedAt = None


class Towers:
    """The towers of a model bundle, loaded once, when they are first wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def loaded(self) -> ModelBundle:
        """The bundle with its towers."""
        from encoders.towers.bundle import load_bundle

        return load_bundle(self.path)


class Gathered(NamedTuple):
    """What ``build_release`` takes."""

    inputs: dict[str, EntityInput]
    bundle: Path
    queries: dict[str, QuerySet] | None


def gather(
    store: ReleaseStore,
    sources: RebuildSources,
    config: RebuildConfig,
    scratch: Path,
    dry_run: bool,
) -> Gathered:
    """Read the sources, embed what has to be embedded, and write foreign live entries again.

    Raises:
        ConfigError: The options name no source, or two that exclude each other.
        BundleError: The bundle is damaged.
    """
    if sources.from_active:
        if sources.signals or sources.catalogue or sources.bundle:
            raise ConfigError(
                "--from-active takes everything from the active release: leave --bundle,"
                " --catalogue and --signals out"
            )
        if sources.exported_at is not None:
            raise ConfigError(
                "--exported-at says how old a catalogue is, but --from-active reads none: leave it"
                " out"
            )
        with stage("read the active release"):
            inputs, bundle = from_release(store, sources.entity_types)
        towers = Towers(bundle)
    else:
        if sources.bundle is None or not (sources.catalogue or sources.signals):
            raise ConfigError(
                "name a source: --bundle with --catalogue or --signals, or --from-active"
            )
        bundle = sources.bundle
        towers = Towers(bundle)
        _check_bundle(bundle)
        times = SourceTimes.now(store, sources.catalogue, sources.exported_at, sources.reading)
        catalogue = _catalogue(sources)
        if catalogue is not None:
            _warn_of_empty_fields(catalogue, bundle)
        if sources.signals is None and dry_run:
            assert catalogue is not None
            return Gathered(times.apply(_unembedded(catalogue, bundle), catalogue), bundle, None)
        inputs = _from_tables(store, sources, towers, catalogue, scratch)
        named = None if sources.signals is None else SignalStore(sources.signals)
        inputs = times.apply(inputs, catalogue, named)
    if not dry_run:
        embed_foreign_live(store, towers, inputs, config)
        inputs = _with_pairs(sources, towers, inputs)
        if sources.fusion_weights is not None:
            inputs = with_weights(inputs, sources.fusion_weights)
    return Gathered(inputs, bundle, _queries(sources.queries, towers, config))


def _with_pairs(
    sources: RebuildSources, towers: Towers, inputs: dict[str, EntityInput]
) -> dict[str, EntityInput]:
    """Give entities the pairs that vote and those that fit the weights of fused answers."""
    if sources.pairs is None and sources.state is None:
        return inputs
    with stage("read the pairs and embed the queries that fit the weights"):
        return with_engagements(
            inputs,
            engaged_and_calibrating(sources),
            lambda texts: np.ascontiguousarray(
                towers.loaded.embed_queries(list(texts)), np.float32
            ),
            sources.min_query_users,
        )


def engaged_and_calibrating(sources: RebuildSources) -> pl.DataFrame:
    """Read the pairs that vote and those that calibrate, without queries that were deleted."""
    from encoders.enrichment.engaged_pairs import read_engaged_pairs
    from encoders.tables.files import read_table
    from encoders.text.normal_forms import fold_query

    pairs = None if sources.pairs is None else read_table(sources.pairs, "pairs")
    if sources.state is None:
        assert pairs is not None
        return pairs
    engaged = read_engaged_pairs(sources.state)
    voting = engaged.pairs.with_columns(split=pl.lit("train"))
    if pairs is None:
        return voting
    is_deleted = fold_query(pl.col("query")).is_in(engaged.deleted_queries)
    others = pairs.filter((pl.col("split") != "train") & ~is_deleted)
    return pl.concat([voting, others], how="diagonal_relaxed")


def _from_tables(
    store: ReleaseStore,
    sources: RebuildSources,
    towers: Towers,
    catalogue: pl.DataFrame | None,
    scratch: Path,
) -> dict[str, EntityInput]:
    """Read the signal store, filled from the catalogue where none was named."""
    from encoders.towers.bundle import read_space_id

    signals = sources.signals
    entity_types = sources.entity_types
    if signals is None:
        assert catalogue is not None
        signals = store.root / "signals" / read_space_id(towers.path)[:16]
        with stage("embed the catalogue"):
            _embed(towers, catalogue, signals)
        entity_types = entity_types or tuple(sorted(catalogue["entity_type"].unique().to_list()))
    with stage("read the signals"):
        return from_signals(SignalStore(signals), entity_types, catalogue, scratch)


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


def _catalogue(sources: RebuildSources) -> pl.DataFrame | None:
    paths, entity_types = sources.catalogue, sources.entity_types
    if not paths:
        return None
    from encoders.tables.files import check_table

    catalogue, _, report = check_table(
        paths[0] if len(paths) == 1 else paths, "catalogue", reading=sources.reading
    )
    for note in report.notes:
        say(f"note: {note}")
    return (
        catalogue.filter(pl.col("entity_type").is_in(entity_types)) if entity_types else catalogue
    )


def _warn_of_empty_fields(catalogue: pl.DataFrame, bundle_path: Path) -> None:
    """Warn of fields that the towers learned from and that this catalogue lacks.

    The usual cause: the bundle was trained on the enriched catalogue, this is the raw one.
    """
    from encoders.tables.profile import filled_shares

    config = bundle_path / "config.json"
    if not config.is_file():
        return
    trained = json.loads(config.read_text(encoding="utf-8")).get("filled", {})
    learned = {name: share for name, share in trained.items() if share >= _LEARNED_FROM}
    now = filled_shares(catalogue, learned)
    for name, share in learned.items():
        if now[name] < share / 10:
            say(
                f"warning: {name} has a value in {now[name]:.1%} of this catalogue's rows, but had"
                f" in {share:.1%} of those the towers were trained on: answers will be worse. Give"
                " the enriched catalogue (omni pairs and omni enrich write it)."
            )


def _embed(towers: Towers, catalogue: pl.DataFrame, signal_root: Path) -> None:
    """Embed the rows whose inputs changed since the signal store was written."""
    from encoders.inference.batch_embedding import embed_catalogue

    report = embed_catalogue(
        towers.loaded, [catalogue], SignalStore(signal_root), total=catalogue.height
    )
    for name, entity in report.entity_types.items():
        say(
            f"{name}: {entity.embedded:,} embedded, {entity.unchanged + entity.resumed:,} taken"
            " over"
        )
    for line in report.notes():
        say(line)


def _unembedded(catalogue: pl.DataFrame, bundle_path: Path) -> dict[str, EntityInput]:
    """Return what a dry run plans with: the ids, and zero vectors that take no memory."""
    bundle = read_bundle(bundle_path)
    nothing = np.zeros((1, bundle.dimension), np.float32)
    return {
        str(name): EntityInput(
            ids=rows["id"].to_list(),
            vectors=np.broadcast_to(nothing, (rows.height, bundle.dimension)),
            space_id=bundle.space_id,
            attributes=attributes_for(rows, str(name), rows["id"].to_list()),
        )
        for (name,), rows in catalogue.group_by("entity_type", maintain_order=True)
    }


def _queries(
    path: Path | None, towers: Towers, config: RebuildConfig
) -> dict[str, QuerySet] | None:
    if path is None:
        return None
    with stage("embed the queries"):
        texts = read_query_texts(
            path,
            config.golden_queries + max(CALIBRATION_QUERIES, config.calibration_queries),
            config.seed,
        )
        vectors = towers.loaded.embed_queries(texts)
        return {"*": QuerySet(texts, np.ascontiguousarray(vectors, np.float32))}


def embed_foreign_live(
    store: ReleaseStore, towers: Towers, inputs: dict[str, EntityInput], config: RebuildConfig
) -> None:
    """Write live entities of another space again, where they carry their catalogue row.

    They are embedded with this bundle. That takes minutes, and writes go on: an entity written
    meanwhile keeps its newer entry, which is embedded in the next round.
    """
    if not config.fold_live:
        return
    bundle = read_bundle(towers.path)
    for entity_type, entities in inputs.items():
        for _ in range(_EMBED_ROUNDS):
            live = writes_for(entity_type, entities, store)
            foreign = [entry for entry in decide(entities, live).foreign if entry.source]
            if not foreign:
                break
            with (
                stage(f"embed {len(foreign):,} live {entity_type} entities with the new bundle"),
                LiveLogWriter(
                    store.live_root, entity_type, bundle.dimension, after=entities.base_watermark
                ) as writer,
            ):
                writer.write_unless_changed(
                    embed_again(foreign, towers.loaded), since=live.watermark
                )
