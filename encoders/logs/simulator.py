"""Simulate a search log of any size from annotation pairs, to test correctness and scale.

Everything it makes is simulated. It is fit for correctness, scale and cache studies, and unfit for
any claim about quality.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.errors import ConfigError, DataError
from encoders.tables.files import write_table
from encoders.tables.schemas import ACTIONS, LOG

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

COUNTRIES: dict[str, tuple[str, ...]] = {
    "en": ("US", "US", "US", "GB", "IN", "CA", "AU"),
    "de": ("DE", "DE", "AT", "CH"),
    "fr": ("FR", "FR", "CA", "BE"),
    "es": ("ES", "MX", "AR", "CO"),
    "pt": ("BR", "BR", "PT"),
    "ja": ("JP",),
    "ko": ("KR",),
    "zh": ("TW", "HK", "CN"),
    "hi": ("IN",),
    "uk": ("UA",),
    "ar": ("EG", "SA"),
}
"""Countries of a language's users; a language that is not here is a country, in capitals."""

BLAND_TITLES = (
    "ideas",
    "my board",
    "stuff",
    "inspiration",
    "other",
    "for later",
    "!!!",
    "home",
    "wish list",
    "1",
)
MICROSECONDS = 1_000_000
DAY = 86_400 * MICROSECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatorConfig:
    """What log to make."""

    rows: int = 1_000_000
    """Events to make; the log holds this many within a few percent, plus duplicates."""
    days: int = 730
    """Length of the log."""
    start: datetime = field(default_factory=lambda: datetime(2024, 1, 1, tzinfo=UTC))
    """Time of the first event."""
    rows_per_file: int = 1_000_000
    """Size of the part files; each covers an equal share of the time. Peak memory grows with it."""
    users: int = 50_000
    """Users who search."""
    query_exponent: float = 0.9
    """Zipf exponent of query popularity."""
    entity_exponent: float = 0.6
    """Zipf exponent of entity popularity."""
    results_per_search: int = 4
    """Impressions per search."""
    searches_per_session: float = 1.8
    """Mean searches of one session, about a minute apart."""
    board_rows: int | None = None
    """Rows of the boards table; None: a tenth of ``rows``."""
    noise: float = 0.25
    """Share of results that have nothing to do with the query."""
    messy: float = 0.02
    """Share of searches typed with stray spaces or in another Unicode form."""
    duplicates: float = 0.01
    """Share of events written twice."""
    late: float = 0.01
    """Share of events written one to fourteen days after they happened."""
    suggestion_clicks: float = 0.08
    """Share of searches that end in a click on a suggested query."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "days", "rows_per_file", "users", "results_per_search"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"SimulatorConfig.{name} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("noise", "messy", "duplicates", "late", "suggestion_clicks"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"SimulatorConfig.{name} is a share and must be within 0..1, got"
                    f" {getattr(self, name)}"
                )
        if self.searches_per_session < 1:
            raise ConfigError(
                "SimulatorConfig.searches_per_session must be at least 1, got"
                f" {self.searches_per_session}"
            )


class _World(NamedTuple):
    """The fixed part of the simulation: which user searches for what.

    ``P`` pairs, sorted by language, query.
    """

    texts: pl.Series
    """``(4 * Q,)`` query texts: as annotated, then three messy variants, in blocks of Q."""
    languages: list[str]
    language_range: Floats
    """``(L + 1,)`` cumulative popularity where each language starts."""
    popularity: Floats
    """``(P,)`` cumulative popularity of pairs: the query's, divided by entity popularity."""
    pair_query: Ints
    pair_entity: Ints
    entity_pairs: Ints
    """``(P,)`` pairs sorted by entity, to find a related query."""
    entity_start: Ints
    """``(E + 1,)`` where each entity's pairs start in ``entity_pairs``."""
    entity_ids: pl.Series
    entity_types: pl.Series
    entity_popularity: Floats
    """``(E,)`` cumulative."""
    user_ids: pl.Series
    user_language: Ints
    countries: list[list[str]]


def _zipf(n: int, exponent: float, rng: np.random.Generator) -> Floats:
    """Return the popularity of ``n`` things whose ranks are shuffled; sums to 1."""
    weights = (np.arange(n) + 2.7) ** -exponent
    rng.shuffle(weights)
    normalised: Floats = weights / weights.sum()
    return normalised


def _build_world(pairs: pl.DataFrame, config: SimulatorConfig) -> _World:
    """Number queries, entities and users, and draw their popularity."""
    rng = np.random.default_rng([config.seed, 1])
    columns = ("language", "query", "entity_type", "entity_id")
    pairs = pairs.select(columns).unique(maintain_order=True)
    pairs = pairs.filter(pl.col("entity_type") != "query").sort("language", "query", "entity_id")
    if not pairs.height:
        raise DataError(
            "the simulator needs pairs of pins, products or ads to draw searches from, but got none"
        )
    queries = pairs.select("language", "query").unique(maintain_order=True).with_row_index("q")
    entities = (
        pairs.select("entity_type", "entity_id").unique(maintain_order=True).with_row_index("e")
    )
    coded = pairs.join(queries, on=["language", "query"], maintain_order="left").join(
        entities, on=["entity_type", "entity_id"], maintain_order="left"
    )
    q = coded["q"].to_numpy().astype(np.int64)
    e = coded["e"].to_numpy().astype(np.int64)
    by_entity = _zipf(entities.height, config.entity_exponent, rng)
    by_query = _zipf(queries.height, config.query_exponent, rng)
    share = by_entity[e] / np.bincount(q, weights=by_entity[e])[q]
    weight = by_query[q] * share
    popularity = np.cumsum(weight)
    language = coded["language"].rle_id().to_numpy()
    language_weight = np.bincount(language, weights=weight)
    names = coded["language"].unique(maintain_order=True).to_list()
    texts = queries["query"].to_list()
    messy = (
        [f" {t}" for t in texts]
        + [f"{t}  " for t in texts]
        + [unicodedata.normalize("NFD", t) for t in texts]
    )
    users = [
        hashlib.blake2b(f"{config.seed}:{n}".encode(), digest_size=8).hexdigest()
        for n in range(config.users)
    ]
    return _World(
        texts=pl.Series(texts + messy),
        languages=names,
        language_range=np.concatenate([[0.0], np.cumsum(language_weight)]),
        popularity=popularity,
        pair_query=q,
        pair_entity=e,
        entity_pairs=np.argsort(e, kind="stable"),
        entity_start=np.concatenate([[0], np.cumsum(np.bincount(e))]).astype(np.int64),
        entity_ids=entities["entity_id"],
        entity_types=entities["entity_type"],
        entity_popularity=np.cumsum(by_entity),
        user_ids=pl.Series(users),
        user_language=rng.choice(
            len(names), config.users, p=language_weight / language_weight.sum()
        ).astype(np.int64),
        countries=[list(COUNTRIES.get(n, (n[:2].upper(),))) for n in names],
    )


def simulate_log(pairs: pl.DataFrame, config: SimulatorConfig) -> Iterator[pl.DataFrame]:
    """Make the log part by part, in the order of writing: late events are in later parts.

    Args:
        pairs: Pairs table; ``language``, ``query``, ``entity_type`` and ``entity_id`` are read.
        config: What to make. The same config and pairs give the same log.

    Yields:
        Tables of the log's schema, ``config.rows_per_file`` rows each or less.

    Raises:
        DataError: There are no pairs to draw from.
    """
    world = _build_world(pairs, config)
    parts = max(1, round(config.rows / config.rows_per_file))
    span = config.days * DAY // parts
    origin = int(config.start.timestamp()) * MICROSECONDS
    postponed: list[tuple[int, pl.DataFrame]] = []
    for part in range(parts):
        rng = np.random.default_rng([config.seed, 2, part])
        begin, end = origin + part * span, origin + (part + 1) * span
        wanted = config.rows * (part + 1) // parts - config.rows * part // parts
        events = _events(world, config, wanted, begin, end, rng)
        late = rng.random(events.height) < config.late
        delay = np.where(late, rng.integers(DAY, 14 * DAY, events.height), 0)
        arrival = events["timestamp"].to_physical().to_numpy() + delay
        later = (arrival >= end) & (part + 1 < parts)
        due = [frame for when, frame in postponed if when == part]
        postponed = [item for item in postponed if item[0] != part]
        held = events.filter(pl.Series(later))
        part_of_held = np.minimum((arrival[later] - origin) // span, parts - 1)
        for target in np.unique(part_of_held):
            chosen = held.filter(pl.Series(part_of_held == target))
            postponed.append((int(target), chosen))
        written = pl.concat([events.filter(pl.Series(~later)), *due])
        again = written.filter(pl.Series(rng.random(written.height) < config.duplicates))
        yield pl.concat([written, again])


def _draw(cumulative: Floats, uniform: Floats) -> Ints:
    """Draw rows by cumulative popularity, for uniform numbers between 0 and its last value."""
    rows = np.searchsorted(cumulative, uniform, side="right")
    return np.minimum(rows, len(cumulative) - 1).astype(np.int64)


def _events(
    world: _World,
    config: SimulatorConfig,
    wanted: int,
    begin: int,
    end: int,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Make ``wanted`` events between two times (microseconds since 1970), in time order."""
    searches = max(1, int(wanted / (config.results_per_search + 0.9)))
    frames, rows = [], 0
    while rows < wanted:
        frame = _search_events(world, config, searches, begin, end, rng)
        frames.append(frame)
        rows += frame.height
        searches = max(64, searches // 20)
    merged = pl.concat(frames).head(wanted)
    return merged.sort("timestamp", maintain_order=True)


class _Searches(NamedTuple):
    """Searches, ``n`` of them, in time order within a session."""

    user: Ints
    when: Ints
    """Microseconds since 1970."""
    language: Ints
    pair: Ints
    """The pair that the user has in mind: query and wanted entity."""
    query: Ints


class _Results(NamedTuple):
    """What ``n`` searches showed, ``k`` results each."""

    entity: Ints
    """(n, k)"""
    relevant: npt.NDArray[np.bool_]
    """(n, k) annotated with the query."""


class _Rows(NamedTuple):
    """Log rows of one kind; every field has one value per row."""

    search: Ints
    when: Ints
    entity: Ints
    """Meaningless for clicks on suggestions."""
    action: Ints
    """Place in ``ACTIONS``."""
    dwell: Floats
    """Seconds; NaN: none."""
    position: Ints
    """Rank, from 1."""


def _search_events(
    world: _World,
    config: SimulatorConfig,
    searches: int,
    begin: int,
    end: int,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """Make the events of some searches, search by search."""
    made = _make_searches(world, config, _session_times(config, searches, begin, end, rng), rng)
    shown = _make_results(world, config, made, rng)
    impressions = _impressions(made, shown)
    clicks, follow_ups = _make_clicks(world, made, shown, rng)
    suggestions, suggested = _make_suggestion_clicks(world, config, made, rng)
    kinds = (impressions, clicks, follow_ups, suggestions)
    rows = _Rows(*(np.concatenate(values) for values in zip(*kinds, strict=True)))
    rows = rows._replace(when=np.clip(rows.when, begin, end - 1))
    # How each search was typed: as annotated, or in one of three messy forms.
    variant = np.where(rng.random(searches) < config.messy, rng.integers(1, 4, searches), 0)
    typed = world.texts.gather(made.query + variant * (len(world.texts) // 4))
    events = _event_table(world, made, rows, typed)
    # The last rows are clicks on suggestions: their entity is the suggested query.
    suggested_text = world.texts.gather(suggested)
    first = events.height - len(suggested_text)
    of_query = events[first:].with_columns(
        entity_type=pl.lit("query"), entity_id=suggested_text.alias("entity_id")
    )
    # In time order within a user's search, so that cutting at a row count keeps whole prefixes.
    order = pl.Series("__s", rows.search)
    return (
        pl.concat([events[:first], of_query])
        .with_columns(order)
        .sort("__s", maintain_order=True)
        .drop("__s")
        .select(c.name for c in LOG.columns)
    )


def _session_times(
    config: SimulatorConfig, searches: int, begin: int, end: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Draw who searches when: a session is a few searches of one user, about a minute apart.

    Returns:
        ``(n,)`` user and time of each search.
    """
    fresh = rng.random(searches) < 1 / config.searches_per_session
    fresh[0] = True
    session = np.cumsum(fresh) - 1
    count = int(session[-1]) + 1
    # The square: some users search far more than others.
    user = (config.users * rng.random(count) ** 2).astype(np.int64)[session]
    place = np.arange(searches) - np.flatnonzero(fresh)[session]
    start = _evening_times(count, begin, end, rng)[session]
    when = start + place * 60 * MICROSECONDS + rng.integers(0, 30 * MICROSECONDS, searches)
    return user, when


def _make_searches(
    world: _World, config: SimulatorConfig, times: tuple[Ints, Ints], rng: np.random.Generator
) -> _Searches:
    """Draw what each user has in mind, by popularity in the user's language."""
    user, when = times
    language = world.user_language[user]
    low, high = world.language_range[language], world.language_range[language + 1]
    pair = _draw(world.popularity, low + rng.random(len(user)) * (high - low))
    return _Searches(user, when, language, pair, world.pair_query[pair])


def _make_results(
    world: _World, config: SimulatorConfig, made: _Searches, rng: np.random.Generator
) -> _Results:
    """Draw results: the wanted entity near the top, others of the query, and noise."""
    n, k = len(made.user), config.results_per_search
    block = np.arange(k)
    related = _draw(world.popularity, np.repeat(world.popularity[made.pair], k) + 0.0)
    neighbour = related.reshape(n, k) + block - rng.integers(0, k, (n, 1))
    neighbour = np.clip(neighbour, 0, len(world.pair_query) - 1)
    same = world.pair_query[neighbour] == made.query[:, None]

    def any_entities() -> Ints:
        uniform = rng.random(n * k) * world.entity_popularity[-1]
        return _draw(world.entity_popularity, uniform).reshape(n, k)

    entity = np.where(same, world.pair_entity[neighbour], any_entities())
    noisy = rng.random((n, k)) < config.noise
    entity = np.where(noisy, any_entities(), entity)
    relevant = same & ~noisy
    top = np.minimum(rng.geometric(0.5, n) - 1, k - 1)
    entity[np.arange(n), top] = world.pair_entity[made.pair]
    relevant[np.arange(n), top] = True
    return _Results(entity, relevant)


def _impressions(made: _Searches, shown: _Results) -> _Rows:
    """List every result as an impression."""
    n, k = shown.entity.shape
    return _Rows(
        search=np.repeat(np.arange(n), k),
        when=np.repeat(made.when, k),
        entity=shown.entity.ravel(),
        action=np.full(n * k, ACTIONS.index("impression")),
        dwell=np.full(n * k, np.nan),
        position=np.tile(np.arange(k) + 1, n),
    )


def _make_clicks(
    world: _World, made: _Searches, shown: _Results, rng: np.random.Generator
) -> tuple[_Rows, _Rows]:
    """Draw clicks, and what some of them lead to: saves, carts and checkouts.

    Position bias: the chance that a result is looked at falls with its rank; relevance decides what
    happens then.
    """
    n, k = shown.entity.shape
    looked = rng.random((n, k)) < 1 / (1 + 0.35 * np.arange(k))
    clicked = looked & (rng.random((n, k)) < np.where(shown.relevant, 0.55, 0.04))
    dwell = np.exp(rng.normal(np.where(shown.relevant, 2.9, 1.4), 1.0))
    search, place = np.nonzero(clicked)
    seconds = dwell[search, place].round(1)
    entity = shown.entity[search, place]
    strong = rng.random(len(search)) < np.where(seconds >= 10, 0.35, 0.05)
    checkout = rng.random(len(search)) < 0.3
    long_click = (seconds >= 10) & (rng.random(len(search)) < 0.8)
    clicks = _Rows(
        search=search,
        when=made.when[search] + (2 + 3 * place) * MICROSECONDS,
        entity=entity,
        action=np.where(long_click, ACTIONS.index("long_click"), ACTIONS.index("click")),
        dwell=seconds,
        position=place + 1,
    )
    bought = np.where(checkout, ACTIONS.index("checkout"), ACTIONS.index("add_to_cart"))
    is_product = (world.entity_types.gather(entity) != "pin").to_numpy()
    follow_ups = _Rows(
        search=search[strong],
        when=clicks.when[strong] + (seconds[strong] * MICROSECONDS).astype(np.int64),
        entity=entity[strong],
        action=np.where(is_product, bought, ACTIONS.index("save"))[strong],
        dwell=np.full(int(strong.sum()), np.nan),
        position=place[strong] + 1,
    )
    return clicks, follow_ups


def _make_suggestion_clicks(
    world: _World, config: SimulatorConfig, made: _Searches, rng: np.random.Generator
) -> tuple[_Rows, Ints]:
    """Draw clicks on suggested queries: others that were annotated with the wanted entity.

    Returns:
        The rows, and the suggested query of each.
    """
    search = np.flatnonzero(rng.random(len(made.user)) < config.suggestion_clicks)
    wanted = world.pair_entity[made.pair[search]]
    start, stop = world.entity_start[wanted], world.entity_start[wanted + 1]
    place = start + (rng.random(len(search)) * (stop - start)).astype(np.int64)
    suggested = world.pair_query[world.entity_pairs[place]]
    another = suggested != made.query[search]
    search = search[another]
    rows = _Rows(
        search=search,
        when=made.when[search] + DAY // 2880,
        entity=np.zeros(len(search), np.int64),
        action=np.full(len(search), ACTIONS.index("query_click")),
        dwell=np.full(len(search), np.nan),
        position=np.ones(len(search), np.int64),
    )
    return rows, suggested[another]


def _event_table(world: _World, made: _Searches, rows: _Rows, typed: pl.Series) -> pl.DataFrame:
    """Write rows as the log's columns; ``typed`` holds the query text of each search."""
    countries = _countries(world)
    number = made.language * countries.shape[1]
    number += (made.user * 2_654_435_761) % 997 % countries.shape[1]
    return pl.DataFrame(
        {
            "timestamp": pl.Series(rows.when).cast(pl.Datetime("us", "UTC")),
            "query": typed.gather(rows.search),
            "language": pl.Series(world.languages).gather(made.language[rows.search]),
            "country": pl.Series(countries.ravel()).gather(number[rows.search]),
            "user_id": world.user_ids.gather(made.user[rows.search]),
            "entity_type": world.entity_types.gather(rows.entity),
            "entity_id": world.entity_ids.gather(rows.entity),
            "action": pl.Series(list(ACTIONS)).gather(rows.action),
            "dwell_seconds": pl.Series(rows.dwell).fill_nan(None),
            "position": rows.position,
        }
    )


def _evening_times(count: int, begin: int, end: int, rng: np.random.Generator) -> Ints:
    """Draw start times: uniform over days, twice as likely in the evening."""
    times = rng.integers(begin, end, count)
    hour = (times // (3600 * MICROSECONDS)) % 24
    redraw = (hour < 6) & (rng.random(count) < 0.7)
    times[redraw] = np.minimum(times[redraw] + 14 * 3600 * MICROSECONDS, end - 1)
    return times


def _countries(world: _World) -> npt.NDArray[np.str_]:
    """Return ``(L, 12)`` countries per language, repeated to one length."""
    return np.array([[names[i % len(names)] for i in range(12)] for names in world.countries])


def simulate_boards(pairs: pl.DataFrame, config: SimulatorConfig) -> pl.DataFrame:
    """Make a boards table: users file entities under an annotated query or a bland title.

    Returns:
        ``config.board_rows`` rows of the boards schema (some repeat an earlier one, as exports do).
    """
    world = _build_world(pairs, config)
    rng = np.random.default_rng([config.seed, 3])
    n = config.board_rows if config.board_rows is not None else config.rows // 10
    pair = _draw(world.popularity, rng.random(n) * world.popularity[-1])
    user = (config.users * rng.random(n) ** 2).astype(np.int64)
    bland = rng.random(n) < 0.2
    number = np.where(
        bland, rng.integers(0, len(BLAND_TITLES), n), world.pair_query[pair] + len(BLAND_TITLES)
    )
    titles = pl.concat([pl.Series(list(BLAND_TITLES)), world.texts])
    board_ids = pl.select(pl.format("{}-{}", world.user_ids.gather(user), pl.Series(number)))
    return pl.DataFrame(
        {
            "board_id": board_ids.to_series(),
            "title": titles.gather(number),
            "entity_id": world.entity_ids.gather(world.pair_entity[pair]),
        }
    )


def write_simulation(
    pairs: pl.DataFrame, folder: Path, config: SimulatorConfig
) -> dict[str, object]:
    """Write ``log/part-*.parquet``, ``boards.parquet`` and ``simulation.json`` below ``folder``.

    Returns:
        What was made: rows, files, config, and the label ``simulated``.
    """
    rows = files = 0
    for part in simulate_log(pairs, config):
        write_table(part, folder / "log" / f"part-{files:05d}.parquet")
        rows += part.height
        files += 1
    boards = simulate_boards(pairs, config)
    write_table(boards, folder / "boards.parquet")
    summary: dict[str, object] = {
        "simulated": True,
        "note": (
            "Drawn from annotation pairs by omni data simulate-logs: for correctness and scale"
            " only, never for a quality claim."
        ),
        "rows": rows,
        "files": files,
        "boards": boards.height,
        "until": (config.start + timedelta(days=config.days)).isoformat(),
        "config": asdict(config),
    }
    (folder / "simulation.json").write_text(
        json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8"
    )
    return summary
