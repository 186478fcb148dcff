"""``omni release push | pull``, and what ``list`` and ``gc`` do with a store at a URL."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import handle_errors, json_option, print_json, say
from encoders.errors import ConfigError
from index_builder.commands.store_option import full_release_id, open_store, store_option
from index_builder.errors import ReleaseNotFound

if TYPE_CHECKING:
    from index_builder.releases.store import ReleaseStore
    from index_builder.remote.push import Moved

_activate_option = click.option(
    "--no-activate", is_flag=True, help="Do not make it the active release there."
)


@click.command("push")
@click.argument("url", required=False)
@click.option("--release-id", default=None, help="Which release; the active one by default.")
@store_option
@_activate_option
@click.option(
    "--milvus",
    default=None,
    metavar="URI",
    help=(
        "Copy it into Milvus instead: milvus://HOST:PORT, or with /PREFIX behind it. A token comes"
        " from OMNI_MILVUS_TOKEN. Needs the extra `milvus`."
    ),
)
@click.option(
    "--keep",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="Releases that stay in Milvus; the active one stays in any case.",
)
@json_option
@handle_errors
def push_command(**flags: Any) -> None:
    """Push a release to a store at URL, such as s3://bucket/prefix, or into Milvus.

    To a URL only blocks that the releases active there lack are sent. The release is there whole or
    not at all; a killed push is run again, and what it had sent is not sent again. Endpoint and
    credentials come from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, ...). Needs the extra
    `remote`.

    Into Milvus go vectors, ids and attributes, a collection per entity type. Aliases move when all
    golden queries have been answered. A killed push is run again; collections that are whole are
    kept.

    Example: omni release push s3://bucket/releases --store store
    """
    url, milvus = flags["url"], flags["milvus"]
    if (url is None) == (milvus is None):
        raise ConfigError("expected either a URL or --milvus URI. Give one of them.")
    store, release_id = open_store(flags["store_path"]), flags["release_id"]
    wanted = full_release_id(store, release_id) if release_id else store.current()
    if wanted is None:
        raise ReleaseNotFound(
            f"no release is active in {store.root}; name one with --release-id (omni release list)"
        )
    activate, as_json = not flags["no_activate"], flags["as_json"]
    if milvus is not None:
        _push_to_milvus(store, wanted, milvus, flags["keep"], activate=activate, as_json=as_json)
        return
    from index_builder.remote.object_store import ObjectStore
    from index_builder.remote.push import push_release

    _say(push_release(store, wanted, ObjectStore(url), activate=activate), as_json)


def _push_to_milvus(
    store: ReleaseStore, release_id: str, uri: str, keep: int, *, activate: bool, as_json: bool
) -> None:
    """Copy a release into Milvus, and print what was done."""
    from index_builder.releases.milvus import MilvusConfig, MilvusReleases, milvus_errors

    config = MilvusConfig.of_uri(uri, token=os.environ.get("OMNI_MILVUS_TOKEN", ""))
    with store.open(release_id) as release, milvus_errors(config.uri):
        releases = MilvusReleases(config)
        pushed = releases.push(release, activate=activate, keep=keep, progress=say)
        releases.close()
    if as_json:
        print_json(pushed._asdict())
        return
    recall = ", ".join(f"{name} {value:.3f}" for name, value in pushed.recall.items())
    click.echo(
        f"{pushed.release_id}: in Milvus{', active' if pushed.active else ''}; ANN recall@10 of"
        f" golden queries: {recall}"
        f"{'; removed ' + ', '.join(pushed.removed) if pushed.removed else ''}"
    )


@click.command("pull")
@click.argument("url")
@click.option("--release-id", default=None, help="Which release; the one active there by default.")
@store_option
@_activate_option
@json_option
@handle_errors
def pull_command(
    url: str, release_id: str | None, store_path: Path, no_activate: bool, as_json: bool
) -> None:
    """Pull a release from a store at URL into a local store, and make it the active one.

    Only blocks that no release here holds are fetched; every byte is checked before anything can
    be seen. A killed pull is run again and goes on where it stopped. Servers on
    that store switch to it.

    Example: omni release pull s3://bucket/releases --store store
    """
    from index_builder.remote.object_store import ObjectStore
    from index_builder.remote.pull import pull_release

    store = open_store(store_path)
    _say(pull_release(store, ObjectStore(url), release_id, activate=not no_activate), as_json)


def _say(moved: Moved, as_json: bool) -> None:
    if as_json:
        print_json(asdict(moved))
        return
    click.echo(
        f"{moved.release_id}: {moved.moved_bytes / 2**20:,.1f} of {moved.total_bytes / 2**20:,.1f}"
        f" MiB moved{'; active' if moved.active else ''}"
    )


def collect_url(url: str, keep: int, dry_run: bool, as_json: bool) -> None:
    """Collect a store at a URL, and print what went."""
    from index_builder.remote.collection import collect_remote
    from index_builder.remote.object_store import ObjectStore

    done = collect_remote(ObjectStore(url), keep, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "removed": done.releases,
                "packs": len(done.packs),
                "freed_bytes": done.freed_bytes,
                "waiting_packs": done.waiting_packs,
                "dry_run": dry_run,
            }
        )
        return
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {len(done.releases)} releases"
        f"{': ' + ', '.join(done.releases) if done.releases else ''}; {len(done.packs)} packs"
        f" ({done.freed_bytes / 2**20:,.1f} MiB); {done.waiting_packs} packs that nothing uses go"
        " in a day"
    )
