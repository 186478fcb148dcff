"""A seeded simulator that turns annotation pairs into a search log of any size, to test the pipeline's correctness and scale.

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
"""Countries of a language's searchers; a language that is not here is its own country in capitals."""

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
    """People who search."""
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
    """The fixed part of the simulation: who searches for what.

    ``P`` pairs, sorted by language, query.
    """

    texts: pl.Series
    """``(4 * Q,)`` query texts: as annotated, then three messy variants, in blocks of Q."""
    languages: list[str]
    language_range: Floats
    """``(L + 1,)`` cumulative popularity where each language starts."""
    popularity: Floats
    """``(P,)`` cumulative popularity of pairs (query popularity shared out by entity popularity)."""
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
    """Popularity of ``n`` things whose ranks are shuffled; sums to 1."""
    weights = (np.arange(n) + 2.7) ** -exponent
    rng.shuffle(weights)
    normalised: Floats = weights / weights.sum()
    return normalised


def _build_world(pairs: pl.DataFrame, config: SimulatorConfig) -> _World:
    rng = np.random.default_rng([config.seed, 1])
    pairs = pairs.select("language", "query", "entity_type", "entity_id").unique(
        maintain_order=True
    )
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
    q, e = coded["q"].to_numpy().astype(np.int64), coded["e"].to_numpy().astype(np.int64)
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
    """Make the log part by part, in the order in which it would have been written (late events come in later parts).

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
        arrival = events["timestamp"].to_physical().to_numpy() + np.where(
            late, rng.integers(DAY, 14 * DAY, events.height), 0
        )
        later = (arrival >= end) & (part + 1 < parts)
        held = events.filter(pl.Series(later))
        due = [frame for when, frame in postponed if when == part]
        postponed = [item for item in postponed if item[0] != part]
        if held.height:
            for target in np.unique(np.minimum((arrival[later] - origin) // span, parts - 1)):
                chosen = np.minimum((arrival[later] - origin) // span, parts - 1) == target
                postponed.append((int(target), held.filter(pl.Series(chosen))))
        written = pl.concat([events.filter(pl.Series(~later)), *due])
        again = written.filter(pl.Series(rng.random(written.height) < config.duplicates))
        yield pl.concat([written, again])


def _draw(cumulative: Floats, uniform: Floats) -> Ints:
    return np.minimum(
        np.searchsorted(cumulative, uniform, side="right"), len(cumulative) - 1
    ).astype(np.int64)


def _events(
    world: _World,
    config: SimulatorConfig,
    wanted: int,
    begin: int,
    end: int,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """``wanted`` events between two times (microseconds since 1970), in time order."""
    searches = max(1, int(wanted / (config.results_per_search + 0.9)))
    frames, rows = [], 0
    while rows < wanted:
        frame = _search_events(world, config, searches, begin, end, rng)
        frames.append(frame)
        rows += frame.height
        searches = max(64, searches // 20)
    merged = pl.concat(frames).head(wanted)
    return merged.sort("timestamp", maintain_order=True)


def _search_events(
    world: _World,
    config: SimulatorConfig,
    searches: int,
    begin: int,
    end: int,
    rng: np.random.Generator,
) -> pl.DataFrame:
    n, k = searches, config.results_per_search
    # Sessions: a person sits down once and searches a few times, about a minute apart.
    fresh = rng.random(n) < 1 / config.searches_per_session
    fresh[0] = True
    session = np.cumsum(fresh) - 1
    count = int(session[-1]) + 1
    user = (config.users * rng.random(count) ** 2).astype(np.int64)[
        session
    ]  # some people search far more than others
    since = np.arange(n) - np.flatnonzero(fresh)[session]
    when = (
        _evening_times(count, begin, end, rng)[session]
        + since * 60 * MICROSECONDS
        + rng.integers(0, 30 * MICROSECONDS, n)
    )
    language = world.user_language[user]
    low, high = world.language_range[language], world.language_range[language + 1]
    pair = _draw(world.popularity, low + rng.random(n) * (high - low))
    query = world.pair_query[pair]
    # Results: the annotated entity somewhere near the top, others that were annotated with the
    # query too, and noise.
    block = np.arange(k)
    related = _draw(world.popularity, np.repeat(world.popularity[pair], k) + 0.0)
    neighbour = np.clip(
        related.reshape(n, k) + block - rng.integers(0, k, (n, 1)), 0, len(world.pair_query) - 1
    )
    same = world.pair_query[neighbour] == query[:, None]
    shown = np.where(
        same,
        world.pair_entity[neighbour],
        _draw(world.entity_popularity, rng.random(n * k) * world.entity_popularity[-1]).reshape(
            n, k
        ),
    )
    noisy = rng.random((n, k)) < config.noise
    shown = np.where(
        noisy,
        _draw(world.entity_popularity, rng.random(n * k) * world.entity_popularity[-1]).reshape(
            n, k
        ),
        shown,
    )
    top = np.minimum(rng.geometric(0.5, n) - 1, k - 1)
    shown[np.arange(n), top] = world.pair_entity[pair]
    relevant = same & ~noisy
    relevant[np.arange(n), top] = True
    # Position bias: the chance that a result is looked at falls with its rank; relevance decides
    # what happens then.
    looked = rng.random((n, k)) < 1 / (1 + 0.35 * block)
    clicked = looked & (rng.random((n, k)) < np.where(relevant, 0.55, 0.04))
    dwell = np.exp(rng.normal(np.where(relevant, 2.9, 1.4), 1.0))
    row, position = np.nonzero(clicked)
    entity, seconds = shown[row, position], dwell[row, position].round(1)
    opened = when[row] + (2 + 3 * position) * MICROSECONDS
    product = (world.entity_types.gather(entity) != "pin").to_numpy()
    strong = rng.random(len(row)) < np.where(seconds >= 10, 0.35, 0.05)
    done = np.where(
        product,
        np.where(
            rng.random(len(row)) < 0.3, ACTIONS.index("checkout"), ACTIONS.index("add_to_cart")
        ),
        ACTIONS.index("save"),
    )
    action = np.where(
        (seconds >= 10) & (rng.random(len(row)) < 0.8),
        ACTIONS.index("long_click"),
        ACTIONS.index("click"),
    )
    # A click on a suggested query: another query that was annotated with the wanted entity.
    follows = np.flatnonzero(rng.random(n) < config.suggestion_clicks)
    aim = world.pair_entity[pair[follows]]
    start, stop = world.entity_start[aim], world.entity_start[aim + 1]
    suggested = world.pair_query[
        world.entity_pairs[start + (rng.random(len(follows)) * (stop - start)).astype(np.int64)]
    ]
    follows, suggested = (
        follows[suggested != query[follows]],
        suggested[suggested != query[follows]],
    )

    total_impressions = n * k
    search = np.concatenate([np.repeat(np.arange(n), k), row, row[strong], follows])
    stamps = np.concatenate(
        [
            np.repeat(when, k),
            opened,
            opened[strong] + (seconds[strong] * MICROSECONDS).astype(np.int64),
            when[follows] + DAY // 2880,
        ]
    )
    entities = np.concatenate(
        [shown.ravel(), entity, entity[strong], np.zeros(len(follows), np.int64)]
    )
    actions = np.concatenate(
        [
            np.zeros(total_impressions, np.int64),
            action,
            done[strong],
            np.full(len(follows), ACTIONS.index("query_click")),
        ]
    )
    dwells = np.concatenate(
        [
            np.full(total_impressions, np.nan),
            seconds,
            np.full(int(strong.sum()) + len(follows), np.nan),
        ]
    )
    positions = np.concatenate(
        [np.tile(block + 1, n), position + 1, position[strong] + 1, np.ones(len(follows), np.int64)]
    )
    is_query = np.arange(len(search)) >= len(search) - len(follows)
    variant = np.where(rng.random(n) < config.messy, rng.integers(1, 4, n), 0)
    text_rows = query + variant * (len(world.texts) // 4)
    suggestion_rows = np.zeros(len(search), np.int64)
    suggestion_rows[is_query] = suggested
    pick = (user * 2_654_435_761) % 997
    table = _countries(world)
    frame = pl.DataFrame(
        {
            "timestamp": pl.Series(np.clip(stamps, begin, end - 1)).cast(pl.Datetime("us", "UTC")),
            "query": world.texts.gather(text_rows[search]),
            "language": pl.Series(world.languages).gather(language[search]),
            "country": (
                pl.Series(table.ravel()).gather(
                    (language * table.shape[1] + pick % table.shape[1])[search]
                )
            ),
            "user_id": world.user_ids.gather(user[search]),
            "entity_type": world.entity_types.gather(entities),
            "entity_id": world.entity_ids.gather(entities),
            "action": pl.Series(list(ACTIONS)).gather(actions),
            "dwell_seconds": pl.Series(dwells).fill_nan(None),
            "position": positions,
        }
    )
    asked = pl.Series(is_query)
    frame = frame.with_columns(
        pl.when(asked).then(pl.lit("query")).otherwise(pl.col("entity_type")).alias("entity_type"),
        pl.when(asked)
        .then(world.texts.gather(suggestion_rows))
        .otherwise(pl.col("entity_id"))
        .alias("entity_id"),
    )
    # Chronological within a person's search, so that cutting at a row count keeps whole prefixes.
    return (
        frame.with_columns(pl.Series("__s", search))
        .sort("__s", maintain_order=True)
        .drop("__s")
        .select(c.name for c in LOG.columns)
    )


def _evening_times(count: int, begin: int, end: int, rng: np.random.Generator) -> Ints:
    """Start times: uniform over days, twice as likely in the evening."""
    times = rng.integers(begin, end, count)
    hour = (times // (3600 * MICROSECONDS)) % 24
    redraw = (hour < 6) & (rng.random(count) < 0.7)
    times[redraw] = np.minimum(times[redraw] + 14 * 3600 * MICROSECONDS, end - 1)
    return times


def _countries(world: _World) -> npt.NDArray[np.str_]:
    """``(L, 12)`` countries per language, repeated to one length."""
    return np.array([[names[i % len(names)] for i in range(12)] for names in world.countries])


def simulate_boards(pairs: pl.DataFrame, config: SimulatorConfig) -> pl.DataFrame:
    """Make a boards table: people file entities under a query that was annotated with it, or under a bland title.

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
    return pl.DataFrame(
        {
            "board_id": (
                pl.select(
                    pl.format("{}-{}", world.user_ids.gather(user), pl.Series(number))
                ).to_series()
            ),
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
    for files, part in enumerate(simulate_log(pairs, config), start=1):
        write_table(part, folder / "log" / f"part-{files - 1:05d}.parquet")
        rows += part.height
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
