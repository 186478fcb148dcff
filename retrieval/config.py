"""Configuration of a server, checked when it is created."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from encoders.errors import ConfigError
from retrieval.addresses import is_loopback

DAY_SECONDS = 86_400.0

# The ranges of ``ServeConfig``
CHOICES = {
    "transport": ("http2", "grpcio"),
    "device": ("auto", "cuda", "cpu"),
    "encoder_form": ("auto", "onnx-int8", "onnx-fp32", "torch"),
}
AT_LEAST_ONE = (
    "workers",
    "keep_releases",
    "encoder_threads",
    "batch_tokens",
    "max_in_flight",
    "max_encode_queue",
    "search_threads",
    "impression_file_bytes",
)
NOT_NEGATIVE = (
    "max_streams_per_connection",
    "slow_ms",
    "impression_log_bytes",
    "batch_delay_ms",
    "cache_bytes",
    "answer_cache_bytes",
    "in_place_bytes",
    "prewarm_queries",
    "inline_search_us",
    "grace_seconds",
)
POSITIVE = (
    "default_deadline_seconds",
    "max_deadline_seconds",
    "cache_ttl_seconds",
    "poll_seconds",
    "remote_poll_seconds",
    "live_poll_seconds",
    "redis_timeout_ms",
)
FRACTIONS = ("shadow_fraction", "shadow_cpu", "golden_min_recall")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one request. ``DescribeRelease`` reports them.

    More is INVALID_ARGUMENT; RESOURCE_EXHAUSTED where messages or answers have too many bytes.
    """

    max_k: int = 1000
    """Results per search."""
    max_batch: int = 1024
    """Queries of a RetrieveBatch or Embed, entities of an Upsert, ids of a Delete."""
    max_targets: int = 16
    """Searches of a RetrieveMulti."""
    max_query_bytes: int = 2048
    """UTF-8 bytes of one query text (the tower reads at most 64 tokens of it)."""
    max_message_bytes: int = 16 * 2**20
    """Bytes of one gRPC request; an answer may have four times as many."""
    max_score_ids: int = 10_000
    """Ids of a Score."""
    max_filter_bytes: int = 65_536
    """UTF-8 bytes of a filter expression."""
    max_exclude_ids: int = 10_000
    """Ids to exclude per search."""
    max_label_bytes: int = 256
    """UTF-8 bytes of each text that only names something: request_id, language, release_id, ..."""
    max_attributes: int = 64
    """Attribute names of a search; ``*`` stands for all that the release has."""
    max_answer_values: int = 2**20
    """Hits times (1 + attributes of each) of one call, all its searches together."""

    @property
    def max_answer_bytes(self) -> int:
        """Bytes of one answer."""
        return 4 * self.max_message_bytes

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 1:
                raise ConfigError(f"{item.name}: expected a positive number, but got {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One server. Times end in their unit; a fraction is between 0 and 1."""

    releases: Path
    """The releases/ root that a build publishes to; with ``remote_store`` the cache of it."""
    remote_store: str | None = None
    """URL of pushed releases (``s3://bucket/prefix``) that are pulled into ``releases``.

    None: ``releases`` is the store itself.
    """
    remote_poll_seconds: float = 5.0
    """How often ``remote_store`` is looked at."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond loopback only with tokens, client certificates or ``insecure``.
    """
    port: int = 50051
    """gRPC port; 0 picks a free one."""
    metrics_port: int | None = 9464
    """HTTP port of calls as JSON, the page, /metrics and /healthz, under the same TLS and tokens.

    0 picks a free one, None switches it off.
    """
    probe_port: int | None = None
    """HTTP port of /healthz, /livez and /metrics alone: no TLS, no tokens, for a private network.

    0 picks a free one, None: there is none.
    """
    insecure: bool = False
    """Listen beyond loopback though everybody there may ask; nobody may change anything then."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the HTTP port may be asked, beside addresses and this machine's own."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call over HTTP, e.g. https://shop.example; empty: none."""
    transport: str = "http2"
    """Transport of gRPC: http2 or grpcio.

    http2 is this project's own and several times cheaper per call; grpcio is the reference
    implementation.
    """
    workers: int = 1
    """Processes that share the port; a release above ``in_place_bytes`` is one copy for all."""
    in_place_bytes: int = 128 * 2**20
    """Several workers: a release whose graphs take at most this is swapped inside each of them.

    Each loads its own copy. Graphs of more bytes are loaded once, and a change of the release
    starts new workers that share them. 0: every change does.
    """
    limits: Limits = field(default_factory=Limits)

    device: str = "auto"
    """Where queries are encoded: auto (GPU when there is one), cuda, cpu."""
    encoder_form: str = "auto"
    """auto (int8 on CPU when the release has it), onnx-int8, onnx-fp32, torch."""
    encoder_threads: int = 1
    """Threads of one forward pass on CPU."""
    batch_tokens: int = 2048
    """A batch closes when its padded tokens reach this.

    Higher: more throughput; lower: shorter queue behind a long batch.
    """
    batch_delay_ms: float = 0.0
    """How long an idle encoder waits for more texts.

    0: it starts at once, and batches form while it is busy.
    """

    cache_bytes: int = 256 * 2**20
    """Bound of the in-process query cache, bytes; 0 switches it off.

    The default holds about 180,000 queries at 256 dimensions.
    """
    cache_ttl_seconds: float = 30 * DAY_SECONDS
    answer_cache_bytes: int = 64 * 2**20
    """Bound of the answer cache, bytes; 0 switches it off.

    The default holds about 70,000 answers of ten hits. A live write or another release makes
    cached answers old.
    """
    redis_url: str | None = None
    """Second cache tier shared by replicas, e.g. redis://host:6379/0."""
    redis_timeout_ms: float = 15.0
    """A slower Redis counts as a miss; after five failures in a row it is not asked for 5 s."""
    redis_secret: str = ""
    """Key of the digest that guards each value.

    Share it among the replicas, so that nobody else can forge vectors.
    """
    prewarm_queries: int = 5000
    """Most frequent cached queries that are encoded again before a swap to a new space."""

    max_in_flight: int = 256
    """Requests inside one worker; one more is refused with RESOURCE_EXHAUSTED at once."""
    max_encode_queue: int = 256
    """Texts waiting for the encoder of one worker, and as many of batches; more are refused."""
    max_streams_per_connection: int = 0
    """Concurrent calls on one connection; more wait in the client and cost the server nothing.

    0: as many as ``max_in_flight``, at least 100.
    """
    inline_search_us: float = 200.0
    """Searches expected to be shorter run on the event loop, longer ones in a thread."""
    search_threads: int = 2

    poll_seconds: float = 0.25
    """How often releases/CURRENT is read."""
    live_poll_seconds: float = 0.2
    """How often the live log is read.

    A write is visible in every worker within this and its fsync.
    """
    keep_releases: int = 2
    """Releases held in memory, the active one included.

    These can be pinned, and rolled back to at once.
    """
    golden_min_recall: float = 0.0
    """Lowest recall on the golden queries with which a release is served.

    0: the figure in its manifest less a margin.
    """
    accept_writes: bool = True
    query_gate: bool = False
    """Fused answers to queries that the release's query gate takes for nonsense are empty.

    A call decides before it (``fusion.gate``); releases without a gate answer everything.
    """

    shadow_fraction: float = 0.01
    """Share of searches that are answered again exactly, off the hot path."""
    shadow_cpu: float = 0.05
    """Share of one core that shadow searches may use."""
    impression_log: Path | None = None
    """Folder of the impression log, JSON lines in the form of the log table; None: no log."""
    impression_file_bytes: int = 128 * 2**20
    """A file of the impression log that has grown to this is followed by another."""
    impression_log_bytes: int = 10 * 2**30
    """Bound of the whole folder: beyond it lines are dropped and counted, and no file is removed.
    """
    log_query_text: bool = False
    """Write query text to logs and impressions. Off by default: queries are personal."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector for traces, e.g. http://localhost:4317 (needs the extra `otel`)."""
    log_json: bool = False
    """Log lines as JSON objects."""
    access_log: bool = False
    """Log every call: method, code, time, stages, caller; never query text.

    Calls then take the full path, as they do with traces.
    """
    slow_ms: float = 1000.0
    """Calls that take longer are logged in any case; 0: none."""
    default_deadline_seconds: float = 60.0
    """Deadline of a call that sets none."""
    max_deadline_seconds: float = 600.0
    """The longest deadline; what is longer counts as this."""

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Certificate authority of clients (mutual TLS): those without a certificate are refused."""
    tokens: Path | None = None
    """TOML file of tokens (docs/howto/tls_and_tokens.md).

    Without it everybody may ask, and change things where only this machine is listened to.
    """
    grace_seconds: float = 10.0
    """How long SIGTERM waits for requests in flight."""

    @property
    def max_streams(self) -> int:
        """Concurrent calls on one connection."""
        return self.max_streams_per_connection or max(100, self.max_in_flight)

    def __post_init__(self) -> None:
        """Check every setting against its range.

        Raises:
            ConfigError: One is out of range; the message names it.
        """
        object.__setattr__(self, "host", self.host.strip("[]"))
        if self.remote_store is not None:
            object.__setattr__(self, "remote_store", self.remote_store.rstrip("/"))
            self._check("://" in self.remote_store, "remote_store", "a URL")
        for name in ("port", "metrics_port", "probe_port"):
            port = getattr(self, name)
            if port is not None or name == "port":
                self._check(0 <= port < 65536, name, "0 to 65535")
        for name, choices in CHOICES.items():
            expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
            self._check(getattr(self, name) in choices, name, expected)
        for name in AT_LEAST_ONE:
            self._check(getattr(self, name) >= 1, name, "at least 1")
        for name in NOT_NEGATIVE:
            self._check(getattr(self, name) >= 0, name, "0 or more")
        for name in POSITIVE:
            self._check(getattr(self, name) > 0, name, "more than 0")
        for name in FRACTIONS:
            self._check(0 <= getattr(self, name) <= 1, name, "0 to 1")
        with_cert = self.tls_cert is not None
        with_key = self.tls_key is not None
        self._check(with_cert == with_key, "tls_key", "tls_cert and tls_key together")
        self._check(
            self.tls_client_ca is None or with_cert,
            "tls_client_ca",
            "tls_cert and tls_key beside it",
        )
        if not (self.is_local or self.tokens or self.tls_client_ca or self.insecure):
            raise ConfigError(
                f"host: {self.host} can be reached from other machines, where everybody could ask."
                " Give --tokens, or --tls-client-ca with --tls-cert and --tls-key; or say"
                " --insecure, if the network is trusted; or listen on 127.0.0.1."
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def _check(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{name}: expected {expected}, but got {getattr(self, name)!r}.")
