"""``omni serve``: start a server from flags."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from encoders.commands.console import handle_errors, json_option, say
from encoders.errors import ConfigError
from index_builder.commands.store_option import StoreOrUrl
from retrieval.commands.serve_config import config_as_toml, merged, read_config_file
from retrieval.config import DAY_SECONDS, Limits, ServeConfig
from retrieval.observability.logs import configure_logging

DEFAULTS = ServeConfig(releases=Path("."))
LIMITS = Limits()


class Converted(NamedTuple):
    """A flag that stands for a setting in another unit.

    Attributes:
        setting: Of ``ServeConfig`` or ``Limits``.
        convert: Turns the flag's value into the setting's.
    """

    setting: str
    convert: Callable[[Any], Any]


def _mib(value: int) -> int:
    return value * 2**20


def _port(value: int) -> int | None:
    return None if value < 0 else value


@click.command("serve", context_settings={"auto_envvar_prefix": "OMNI_SERVE"})
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help=(
        "TOML file with any setting that --print-config shows; flags, and variables such as"
        " OMNI_SERVE_MAX_K, win over it."
    ),
)
@click.option("--print-config", is_flag=True, help="Print the configuration as TOML and end.")
@click.option(
    "--releases",
    "--store",
    "releases",
    type=StoreOrUrl(path_type=Path, file_okay=False),
    default=None,
    envvar="OMNI_STORE",
    help=(
        "The store that `omni rebuild` publishes to (the folder with releases/ inside), or the URL"
        " that `omni release push` has pushed to."
    ),
)
@click.option(
    "--store-cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for what is pulled from --store URL; by default one below ~/.cache.",
)
@click.option(
    "--store-poll-seconds",
    default=DEFAULTS.remote_poll_seconds,
    show_default=True,
    help="How often --store URL is looked at.",
)
@click.option(
    "--host",
    default=DEFAULTS.host,
    show_default=True,
    help=(
        "Address to listen on. One that other machines can reach needs --tokens, --tls-client-ca or"
        " --insecure."
    ),
)
@click.option(
    "--insecure",
    is_flag=True,
    help=(
        "Listen beyond this machine though everybody there may ask. Admin calls need a token even"
        " then."
    ),
)
@click.option(
    "--port",
    default=DEFAULTS.port,
    show_default=True,
    help="gRPC port; 0 picks a free one and prints it.",
)
@click.option(
    "--metrics-port",
    default=DEFAULTS.metrics_port,
    show_default=True,
    help=(
        "HTTP port of calls as JSON, the page, /metrics and /healthz, with the same TLS and tokens;"
        " 0 picks a free one, -1 switches it off."
    ),
)
@click.option(
    "--probe-port",
    default=-1,
    show_default=True,
    help=(
        "HTTP port of /healthz, /livez and /metrics without TLS and tokens, for a private network;"
        " 0 picks a free one, -1: there is none."
    ),
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help=(
        "Name under which the HTTP port may be asked, beside addresses and this machine's own; may"
        " be repeated, * allows all."
    ),
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Origin whose pages may call, e.g. https://shop.example; may be repeated.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    help=(
        "Processes sharing the port, and the memory of vectors and large graphs (--in-place-mib)."
        " One per core that should serve."
    ),
)
@click.option(
    "--transport",
    type=click.Choice(["http2", "grpcio"]),
    default=DEFAULTS.transport,
    show_default=True,
    help=(
        "What speaks gRPC: this project's HTTP/2 server, or grpcio's (the same answers, several"
        " times the cost per call)."
    ),
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="Where queries are encoded.",
)
@click.option(
    "--encoder-form",
    type=click.Choice(["auto", "onnx-int8", "onnx-fp32", "torch"]),
    default="auto",
    show_default=True,
    help="Form of the query tower on CPU; auto takes int8 where the release has it.",
)
@click.option(
    "--encoder-threads",
    default=1,
    show_default=True,
    help="CPU threads of one forward pass. More: faster alone, less throughput together.",
)
@click.option(
    "--batch-tokens",
    default=DEFAULTS.batch_tokens,
    show_default=True,
    help=(
        "A batch closes at this many padded tokens. Higher: more throughput; lower: shorter queue."
    ),
)
@click.option(
    "--batch-delay-ms",
    default=0.0,
    show_default=True,
    help="How long an idle encoder waits for company. Worth 1 to 2 ms on a busy GPU.",
)
@click.option(
    "--cache-mib",
    default=DEFAULTS.cache_bytes // 2**20,
    show_default=True,
    help="Bound of the query cache in each worker; 0 switches it off.",
)
@click.option(
    "--cache-ttl-days",
    default=DEFAULTS.cache_ttl_seconds / DAY_SECONDS,
    show_default=True,
    help="Age at which a cached query vector is dropped.",
)
@click.option(
    "--answer-cache-mib",
    default=DEFAULTS.answer_cache_bytes // 2**20,
    show_default=True,
    help=(
        "Bound of each worker's cache of answers to repeated texts; 0 switches it off: every call"
        " is searched."
    ),
)
@click.option(
    "--redis",
    "redis_url",
    default=None,
    help="Second cache tier shared by replicas, e.g. redis://host:6379/0 (extra `redis`).",
)
@click.option(
    "--redis-secret",
    default="",
    envvar="OMNI_REDIS_SECRET",
    help=(
        "Guards cached vectors against others who can write to that Redis; the same on all"
        " replicas."
    ),
)
@click.option(
    "--max-in-flight",
    default=DEFAULTS.max_in_flight,
    show_default=True,
    help=(
        "Requests inside one worker. One more is refused at once with RESOURCE_EXHAUSTED and a"
        " retry hint."
    ),
)
@click.option(
    "--max-encode-queue",
    default=DEFAULTS.max_encode_queue,
    show_default=True,
    help="Texts waiting for the query tower, and as many of batches; more are refused.",
)
@click.option("--max-k", default=LIMITS.max_k, show_default=True, help="Largest k.")
@click.option(
    "--max-batch",
    default=LIMITS.max_batch,
    show_default=True,
    help="Most queries, entities or ids in one call.",
)
@click.option(
    "--keep-releases",
    default=DEFAULTS.keep_releases,
    show_default=True,
    help="Releases held in memory: what can be pinned and rolled back to at once.",
)
@click.option(
    "--in-place-mib",
    default=DEFAULTS.in_place_bytes // 2**20,
    show_default=True,
    help=(
        "With several workers: graphs of at most so many MiB are loaded by each worker for itself,"
        " without new processes; larger ones once for all, in new workers. 0: always so."
    ),
)
@click.option("--read-only", is_flag=True, help="Take no live upserts and deletes.")
@click.option(
    "--query-gate",
    is_flag=True,
    help=(
        "Fused answers to nonsense are empty, where the release has a query gate and the call does"
        " not decide."
    ),
)
@click.option(
    "--shadow-fraction",
    default=DEFAULTS.shadow_fraction,
    show_default=True,
    help="Share of searches answered again exactly to measure recall; 0 switches it off.",
)
@click.option(
    "--shadow-cpu",
    default=DEFAULTS.shadow_cpu,
    show_default=True,
    help="Share of one core that this may use.",
)
@click.option(
    "--impression-log",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for what was shown, as JSON lines in the form of the log table.",
)
@click.option(
    "--impression-log-mib",
    default=DEFAULTS.impression_log_bytes // 2**20,
    show_default=True,
    help="Bound of that folder; beyond it lines are dropped and counted.",
)
@click.option(
    "--log-query-text",
    is_flag=True,
    help="Write query text to the impression log. Off by default: queries are personal.",
)
@click.option("--log-json", is_flag=True, help="Log lines as JSON objects.")
@click.option(
    "--access-log",
    is_flag=True,
    help="Log every call with its caller and the times of its stages; never query text.",
)
@click.option(
    "--slow-ms",
    default=DEFAULTS.slow_ms,
    show_default=True,
    help="Log calls that take longer, as --access-log does; 0: none.",
)
@click.option(
    "--otlp",
    "otlp_endpoint",
    default=None,
    help="OpenTelemetry collector for traces, e.g. http://localhost:4317 (extra `otel`).",
)
@click.option(
    "--tls-cert",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Certificate chain, PEM.",
)
@click.option(
    "--tls-key",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Its private key, PEM.",
)
@click.option(
    "--tls-client-ca",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Only clients with a certificate of this authority get in.",
)
@click.option(
    "--tokens",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="TOML file of tokens with their entity types and admin right;"
    " see docs/howto/tls_and_tokens.md.",
)
@click.option(
    "--grace-seconds",
    default=DEFAULTS.grace_seconds,
    show_default=True,
    help="How long SIGTERM waits for calls in flight.",
)
@json_option
@handle_errors
def command(**flags: Any) -> None:
    """Serve the active release of a store over gRPC and as JSON over HTTP, and follow it.

    \b
    The server watches <store>/releases/CURRENT, or pulls what becomes active at the URL that
    --store names: a newly activated release is loaded beside the old one, must answer its golden
    queries, and takes over without a failed call. It listens on the gRPC port once a release is
    loaded; until then /healthz says what it waits for. SIGTERM drains, SIGHUP reads tokens and
    certificates again (as a change of their files does).

    \b
    Example:
        omni serve --store store --port 50051
        curl http://localhost:9464/omnisearchsage.v1.Retrieval/Retrieve \\
            -H 'content-type: application/json' \\
            -d '{"query": "blue whale", "entityType": "pin", "k": 5}'
    """  # noqa: D301
    as_json = bool(flags.pop("as_json"))
    file = flags.pop("config_file")
    print_only = flags.pop("print_config")
    settings = settings_of_flags(flags)
    config = merged(settings, {} if file is None else read_config_file(file), given_settings())
    if flags["store_cache"] is not None and config.remote_store is None:
        raise ConfigError("--store-cache: expected a URL as --store, but got a folder")
    if print_only:
        click.echo(config_as_toml(config), nl=False)
        return
    configure_logging(config.log_json)
    from retrieval.server.remote_store import following_remote_store

    with following_remote_store(config):
        _run(config, as_json)


def _run(config: ServeConfig, as_json: bool) -> None:
    """Serve until a signal ends it."""
    if config.workers > 1:
        from retrieval.server.supervisor import serve_with_workers

        serve_with_workers(config, lambda info: announce(info, as_json))
        return
    try:
        import uvloop

        uvloop.run(_serve(config, as_json))
    except ImportError:
        asyncio.run(_serve(config, as_json))


FLAGS: dict[str, Converted] = {
    "metrics_port": Converted("metrics_port", _port),
    "probe_port": Converted("probe_port", _port),
    "impression_log_mib": Converted("impression_log_bytes", _mib),
    "cache_mib": Converted("cache_bytes", _mib),
    "answer_cache_mib": Converted("answer_cache_bytes", _mib),
    "in_place_mib": Converted("in_place_bytes", _mib),
    "cache_ttl_days": Converted("cache_ttl_seconds", lambda days: days * DAY_SECONDS),
    "store_poll_seconds": Converted("remote_poll_seconds", float),
    "read_only": Converted("accept_writes", lambda read_only: not read_only),
}
"""Flags that are not settings as they are."""
LIMIT_FLAGS = ("max_k", "max_batch")
STORE_FLAGS = ("releases", "store_cache")


def settings_of_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``ServeConfig`` that flags stand for, limits in a dictionary."""
    limits = {name: flags[name] for name in LIMIT_FLAGS}
    settings: dict[str, Any] = {"limits": limits, **_store_settings(*map(flags.get, STORE_FLAGS))}
    for name, value in flags.items():
        if name in (*LIMIT_FLAGS, *STORE_FLAGS):
            continue
        converted = FLAGS.get(name)
        settings[converted.setting if converted else name] = (
            converted.convert(value) if converted else value
        )
    return settings


def _store_settings(store: Path | str | None, cache: Path | None) -> dict[str, Any]:
    """Return the settings of ``--store``, a folder or a URL, and of its cache folder."""
    if isinstance(store, str):
        return {"releases": cache, "remote_store": store}
    return {"releases": cache or store, "remote_store": None}


def given_settings() -> set[str]:
    """Return the names of settings that the command line or the environment sets."""
    context = click.get_current_context()
    given = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    names = [name for name in context.params if context.get_parameter_source(name) in given]
    settings = {FLAGS[name].setting if name in FLAGS else name for name in names}
    if "releases" in names:
        settings.add("remote_store")
    if "store_cache" in names:
        settings.add("releases")
    return settings


def announce(info: dict[str, Any], as_json: bool) -> None:
    """Say where the server listens: one JSON line on stdout, or one sentence on stderr."""
    if as_json:
        click.echo(json.dumps(info))
        sys.stdout.flush()
        return
    scheme = "https" if info["tls"] else "http"
    page = (
        f"; JSON, page and /metrics on {scheme}://localhost:{info['metrics_port']}/"
        if info["metrics_port"] is not None
        else ""
    )
    state = (
        f"serving release {info['release_id']}"
        if info["release_id"]
        else f"not ready: {info['reason']}"
    )
    say(f"listening on {info['host']}:{info['port']}{page}; {state}")


async def _serve(config: ServeConfig, as_json: bool) -> None:
    from retrieval.process_tuning import freeze_start_up_objects
    from retrieval.server.server import Server, create_server, run_until_signalled

    def ready(server: Server) -> None:
        active = server.releases.active
        info = {
            "host": config.host,
            "port": server.port,
            "metrics_port": server.metrics_port,
            "probe_port": server.probe_port,
            "release_id": active.release_id if active else None,
            "reason": None if active else server.releases.reason_not_ready,
            "workers": 1,
            "tls": config.tls_cert is not None,
        }
        announce(info, as_json)

    server = await create_server(config)
    freeze_start_up_objects(server.releases.on_change)
    await run_until_signalled(server, ready)
