"""``omni release``: list, show, verify, diff, activate, roll back, move and collect releases."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from encoders.commands.console import (
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stdout,
)
from encoders.errors import ConfigError
from index_builder.commands.release_remote import collect_url, pull_command, push_command
from index_builder.commands.store_option import (
    full_release_id,
    open_store,
    store_option,
    store_or_url_option,
)
from index_builder.errors import LiveLogError, ReleaseCorrupt, ReleaseError, ReleaseNotFound
from index_builder.live_log.files import log_files
from index_builder.live_log.maintenance import trust_log as trust_checksums
from index_builder.live_log.reader import LiveLogReader
from index_builder.releases.store import CURRENT_NAME, ReleaseStore, ReleaseSummary


def _named_or_current(store: ReleaseStore, release_id: str | None) -> str:
    found = full_release_id(store, release_id) if release_id else store.current()
    if found is None:
        raise ReleaseNotFound(
            f"no release is active in {store.root}; name one (omni release list) or publish one"
            " (omni rebuild)"
        )
    return found


@click.group()
def group() -> None:
    """List, show, verify, diff, activate, roll back, push, pull and collect releases.

    The start of an id is enough where only one begins so.

    Example: omni release list --store store
    """


group.add_command(push_command)
group.add_command(pull_command)


@group.command("list")
@store_or_url_option
@json_option
@handle_errors
def list_command(store_path: str, as_json: bool) -> None:
    """List the releases of a store, oldest first; the active one is marked.

    Example: omni release list --store store
    """
    from index_builder.remote.object_store import ObjectStore, is_url

    if is_url(store_path):
        from index_builder.remote.collection import list_remote

        summaries = list_remote(ObjectStore(store_path))
    else:
        summaries = open_store(Path(store_path)).list()
    if as_json:
        print_json([asdict(summary) for summary in summaries])
        return
    console = Console(highlight=False, width=None if stdout.is_terminal else 160)
    console.print(f"releases in {store_path}", style="bold", markup=False, soft_wrap=True)
    console.print(_list_table(summaries), crop=False)


def _list_table(summaries: Sequence[ReleaseSummary]) -> Table:
    """Return one row per release, its id whole on one line: calls take nothing less."""
    table = Table()
    table.add_column("", no_wrap=True, min_width=1)
    table.add_column(
        "release", no_wrap=True, min_width=max((len(s.release_id) for s in summaries), default=0)
    )
    for name in ("entities", "space", "MiB", "created", "parent"):
        table.add_column(name, justify="right" if name == "MiB" else "left", overflow="fold")
    for s in summaries:
        held = ", ".join(f"{name} {count:,}" for name, count in s.entities.items())
        if s.error:
            held = f"DAMAGED: {s.error}"
        cells = (
            "*" if s.active else "",
            s.release_id,
            held,
            s.space_id[:12],
            f"{s.size_bytes / 2**20:,.1f}",
            s.created,
            s.parent or "",
        )
        table.add_row(*(escape(cell) for cell in cells))
    return table


@group.command("show")
@click.argument("release_id", required=False)
@store_option
@json_option
@handle_errors
def show_command(release_id: str | None, store_path: Path, as_json: bool) -> None:
    """Show one release (default: the active one).

    Disk and memory per entity type, graph degrees, norms, measured recall, export forms.

    Example: omni release show --store store
    """
    from index_builder.releases.diff import describe_release

    store = open_store(store_path)
    described = describe_release(store, _named_or_current(store, release_id))
    if as_json:
        print_json(described)
        return
    upgrade = described["query_upgrade"]
    tower = f", query tower of space {upgrade['space_id'][:16]}" if upgrade else ""
    say(
        f"{described['release_id']}{' (active)' if described['active'] else ''}: space"
        f" {described['space_id'][:16]}{tower}, {described['dimension']} dimensions,"
        f" {described['disk_bytes'] / 2**20:,.1f} MiB on disk,"
        f" {described['loaded_private_mib']:,.0f} MiB private once loaded, parent"
        f" {described['parent'] or 'none'}"
    )
    entities = [_entity_row(name, entity) for name, entity in described["entities"].items()]
    print_table("entities", _ENTITY_COLUMNS, entities)
    if described["forms"]:
        forms = [
            (form, r.get("texts"), r.get("cosine_min"), r.get("overlap_at_10"), r.get("passed"))
            for form, r in described["forms"].items()
        ]
        columns = ("form", "texts", "smallest cosine", "overlap@10", "passed")
        print_table("export forms against the trained tower", columns, forms)


_ENTITY_COLUMNS = (
    "type",
    "count",
    "index",
    "disk MiB",
    "build peak MiB",
    "golden recall@10",
    "ef for recall",
    "degrees",
    "norms",
    "watermark",
)


def _entity_row(name: str, entity: dict[str, Any]) -> tuple[Any, ...]:
    degrees, norms = entity["degrees"], entity["norms"]
    return (
        name,
        entity["count"],
        entity["index"].get("kind"),
        round(entity["disk_bytes"] / 2**20, 1),
        entity["build_peak_private_mib"],
        entity["golden"].get("recall"),
        str(entity["settings"] or "exact"),
        f"mean {degrees['mean']}, max {degrees['max']}" if degrees else "-",
        f"{norms['min']:.4f}-{norms['max']:.4f}",
        entity["watermark"],
    )


@group.command("verify")
@click.argument("release_id", required=False)
@store_option
@click.option(
    "--all", "verify_all", is_flag=True, help="Every release of the store, and which one is active."
)
@click.option("--live", is_flag=True, help="Also read the whole live log and check every record.")
@click.option(
    "--trust-log",
    is_flag=True,
    help=(
        "First take what the live log's own checksums prove as all that was written: after"
        " `acknowledged` was lost or damaged."
    ),
)
@json_option
@handle_errors
def verify_command(
    release_id: str | None,
    store_path: Path,
    verify_all: bool,
    live: bool,
    trust_log: bool,
    as_json: bool,
) -> None:
    """Check every byte of a release (default: the active one) against its manifest.

    Exits 1 when anything differs.

    Example: omni release verify --all --live --store store
    """
    store = open_store(store_path)
    results: list[dict[str, Any]] = []
    if verify_all:
        results += _verify_current(store)
        ids = [*store.ids(), *store.damaged_ids()]
    else:
        ids = [_named_or_current(store, release_id)]
    results += [_verify_release(store, name) for name in ids]
    if live or trust_log:
        for folder in sorted(store.live_root.iterdir() if store.live_root.is_dir() else []):
            if folder.is_dir():
                if trust_log:
                    trust_checksums(store.live_root, folder.name)
                results.append(_verify_log(store, folder))
    if as_json:
        print_json(results)
    else:
        _print_verified(results)
    if not all(r["ok"] for r in results):
        sys.exit(1)


def _print_verified(results: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            r["what"],
            "ok" if r["ok"] else "DAMAGED",
            r["files"],
            r["bytes"],
            r["seconds"],
            r["error"] or "",
        )
        for r in results
    ]
    print_table("verified", ("what", "result", "files", "bytes", "seconds", "error"), rows)


def _verify_current(store: ReleaseStore) -> list[dict[str, Any]]:
    """Return a result if ``CURRENT`` is damaged, else nothing."""
    try:
        store.current()
    except ReleaseCorrupt as error:
        return [_result(CURRENT_NAME, error=str(error))]
    return []


def _verify_release(store: ReleaseStore, name: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        manifest = store.verify(name)
    except ReleaseError as error:
        return _result(name, error=str(error), start=start)
    return _result(name, files=len(manifest.files), size=manifest.total_bytes(), start=start)


def _result(
    what: str,
    *,
    files: int | None = None,
    size: int | None = None,
    error: str | None = None,
    start: float | None = None,
) -> dict[str, Any]:
    """Return one line of ``omni release verify``, timed since ``start``."""
    seconds = 0.0 if start is None else round(time.perf_counter() - start, 3)
    return {
        "what": what,
        "ok": error is None,
        "files": files,
        "bytes": size,
        "error": error,
        "seconds": seconds,
    }


def _verify_log(store: ReleaseStore, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    files = log_files(folder)
    count, message = 0, None
    try:
        reader = LiveLogReader(store.live_root, folder.name, after=files[0][0] - 1 if files else 0)
        while batch := reader.poll(20_000):
            count += len(batch)
    except LiveLogError as error:
        message = str(error)
    what = f"live/{folder.name} ({count:,} entries)"
    size = sum(path.stat().st_size for _, path in files)
    return _result(what, files=len(files), size=size, error=message, start=start)


@group.command("diff")
@click.argument("before", required=False)
@click.argument("after", required=False)
@store_option
@json_option
@handle_errors
def diff_command(before: str | None, after: str | None, store_path: Path, as_json: bool) -> None:
    """Compare release BEFORE (default: the active one) with AFTER (default: the newest).

    The newest alone is compared with the active one; when it is active already, the release that
    was active before it with the active one, also without arguments. Shown are overlap@10 of the
    golden queries, drift of scores and norms, and entities added, removed and moved.

    Example: omni release diff --store store
    """
    from index_builder.releases.diff import diff_releases

    store = open_store(store_path)
    first, second, which = _compared(store, before, after)
    result = diff_releases(store, first, second)
    if as_json:
        print_json(result)
        return
    rows = []
    for name, e in result["entities"].items():
        if "only_in" in e:
            rows.append((name, e["count"], None, None, None, None, None, f"only {e['only_in']}"))
            continue
        golden = e["golden"]
        rows.append(
            (
                name,
                e["count"]["after"],
                e["added"]["count"],
                e["removed"]["count"],
                e.get("moved", {}).get("changed"),
                golden["overlap_at_10"],
                golden.get("score_drift_mean"),
                f"{e['kind']['before']} -> {e['kind']['after']}",
            )
        )
    space = "same space"
    if not result["same_space"]:
        space = "DIFFERENT SPACE: every vector and cached query is new"
    say(f"{first} -> {second}{which}: {space}")
    print_table(
        "differences",
        (
            "type",
            "count",
            "added",
            "removed",
            "moved (of 2,000)",
            "overlap@10",
            "score drift",
            "index",
        ),
        rows,
    )


def _compared(store: ReleaseStore, before: str | None, after: str | None) -> tuple[str, str, str]:
    """Return which releases ``diff`` compares, and what to say about the choice."""
    first = _named_or_current(store, before)
    if after is not None:
        return first, full_release_id(store, after), ""
    ids = store.ids()
    if ids and ids[-1] != first:
        return first, ids[-1], "" if before else " (the active release and the newest)"
    active = store.current()
    if active is not None and active != first:
        return active, first, " (the active release, and the newest)"
    earlier = store.earlier()
    if not earlier:
        raise ReleaseNotFound(
            f"nothing to compare {first} with: there is no newer release, and none of those active"
            " before it is left. Name two (omni release list)"
        )
    return (
        earlier[0],
        first,
        " (the release active before, and the active one, which is the newest)",
    )


@group.command("activate")
@click.argument("release_id")
@store_option
@json_option
@handle_errors
def activate_command(release_id: str, store_path: Path, as_json: bool) -> None:
    """Make a release the active one, after checking every byte.

    Running servers switch to it without a failed call.

    Example: omni release activate 2026-01-14T09-30-12Z-ab12cd34ef56 --store store
    """
    store = open_store(store_path)
    release_id = full_release_id(store, release_id)
    _say_active(release_id, store.activate(release_id), as_json)


@group.command("rollback")
@store_option
@json_option
@handle_errors
def rollback_command(store_path: Path, as_json: bool) -> None:
    """Go back to the release that was active before; later live writes are replayed over it.

    Example: omni release rollback --store store
    """
    store = open_store(store_path)
    before = store.current()
    _say_active(store.rollback(), before, as_json)


def _say_active(release_id: str, before: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"active": release_id, "before": before})
    else:
        click.echo(f"active: {release_id} (before: {before or 'none'})")


@group.command("gc")
@store_or_url_option
@click.option(
    "--keep",
    type=int,
    default=3,
    show_default=True,
    help="Newest releases that stay, besides the active one, its predecessor and open ones.",
)
@click.option(
    "--drop-folded-log",
    is_flag=True,
    help=(
        "Also remove live-log files that every kept release contains. Only when rebuilds use"
        " --from-active."
    ),
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@handle_errors
def gc_command(
    store_path: str, keep: int, drop_folded_log: bool, dry_run: bool, as_json: bool
) -> None:
    """Remove old releases and what interrupted builds left.

    Releases that any process has open stay. Of a store at a URL, packs that no release uses go a
    day after a collection has found them.

    Example: omni release gc --keep 3 --store store
    """
    from index_builder.remote.object_store import is_url

    if is_url(store_path):
        if drop_folded_log:
            raise ConfigError("--drop-folded-log: a store at a URL has no live log; leave it out")
        collect_url(store_path, keep, dry_run, as_json)
        return
    store = open_store(Path(store_path))
    removed = store.gc(keep, dry_run=dry_run, drop_folded_log=drop_folded_log)
    if as_json:
        print_json({"removed": removed, "dry_run": dry_run})
    else:
        click.echo(
            f"{'would remove' if dry_run else 'removed'} {len(removed)}"
            f" releases{': ' + ', '.join(removed) if removed else ''}"
        )
