"""``omni serve``: start a server from flags."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from encoders.commands.console import handle_errors, json_option, say
from retrieval.config import DAY_SECONDS, Limits, ServeConfig
from retrieval.observability.logs import configure_logging

DEFAULTS = ServeConfig(releases=Path("."))
LIMITS = Limits()


@click.command("serve")
@click.option(
    "--releases",
    "--store",
    "releases",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    envvar="OMNI_STORE",
    help="The store that `omni rebuild` publishes to (the folder with releases/ inside).",
)
@click.option("--host", default=DEFAULTS.host, show_default=True, help="Address to listen on.")
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
    help="HTTP port of /metrics, /healthz and the page; 0 picks a free one, -1 switches it off.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    help=(
        "Processes sharing the port and one copy of the index memory. One per core that should"
        " serve."
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
    help="Texts waiting for the query tower; more are refused.",
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
@click.option("--read-only", is_flag=True, help="Take no live upserts and deletes.")
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
    "--log-query-text",
    is_flag=True,
    help="Write query text to the impression log. Off by default: queries are personal.",
)
@click.option("--log-json", is_flag=True, help="Log lines as JSON objects.")
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
    """Serve the active release of a store over gRPC, and follow it.

    \b
    The server watches <store>/releases/CURRENT: a newly activated release is loaded beside the
    old one, must answer its golden queries, and takes over without a failed call. Without a usable
    release the server runs, reports NOT_SERVING and waits for one. SIGTERM drains.

    \b
    Example:
        omni serve --store store --port 50051
        grpcurl -plaintext -d '{"query": "blue whale", "entity_type": "pin", "k": 5}' \\
            localhost:50051 omnisearchsage.v1.Retrieval/Retrieve
    """  # noqa: D301
    as_json = bool(flags.pop("as_json"))
    config = config_from_flags(flags)
    configure_logging(config.log_json)
    if config.workers > 1:
        from retrieval.server.supervisor import serve_with_workers

        serve_with_workers(config, lambda info: announce(info, as_json))
        return
    try:
        import uvloop

        uvloop.run(_serve(config, as_json))
    except ImportError:
        asyncio.run(_serve(config, as_json))


def config_from_flags(flags: dict[str, Any]) -> ServeConfig:
    """Flags to a checked configuration; raises ``ConfigError``."""
    flags = dict(flags)
    limits = replace(LIMITS, max_k=flags.pop("max_k"), max_batch=flags.pop("max_batch"))
    metrics_port = flags.pop("metrics_port")
    return ServeConfig(
        limits=limits,
        metrics_port=None if metrics_port < 0 else metrics_port,
        cache_bytes=flags.pop("cache_mib") * 2**20,
        answer_cache_bytes=flags.pop("answer_cache_mib") * 2**20,
        cache_ttl_seconds=flags.pop("cache_ttl_days") * DAY_SECONDS,
        accept_writes=not flags.pop("read_only"),
        **flags,
    )


def announce(info: dict[str, Any], as_json: bool) -> None:
    """Say where the server listens: one JSON line on stdout, or one sentence on stderr."""
    if as_json:
        click.echo(json.dumps(info))
        sys.stdout.flush()
        return
    page = (
        f"; page and /metrics on http://localhost:{info['metrics_port']}/"
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
            "release_id": active.release_id if active else None,
            "reason": None if active else server.releases.reason_not_ready,
            "workers": 1,
        }
        announce(info, as_json)

    server = await create_server(config)
    freeze_start_up_objects(server.releases.on_change)
    await run_until_signalled(server, ready)
