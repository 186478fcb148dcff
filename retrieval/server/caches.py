"""The query caches of a server: Redis tiers by dimension, and what is measured of them."""

from __future__ import annotations

from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.redis_tier import RedisSettings, RedisTier
from retrieval.observability.metric_catalogue import Labels


class RedisTiers:
    """Second cache tiers, opened when a release of their dimension is loaded.

    Attributes:
        opened: All of them.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._by_dimension: dict[int, RedisTier] = {}
        self.opened: list[RedisTier] = []

    def of_dimension(self, dimension: int) -> RedisTier | None:
        """Return the tier for vectors of this length; None where no Redis is configured."""
        config = self._config
        if config.redis_url is None:
            return None
        tier = self._by_dimension.get(dimension)
        if tier is None:
            settings = RedisSettings(
                url=config.redis_url,
                ttl_seconds=config.cache_ttl_seconds,
                timeout_seconds=config.redis_timeout_ms / 1e3,
                secret=config.redis_secret,
            )
            tier = RedisTier(settings, dimension)
            self._by_dimension[dimension] = tier
            self.opened.append(tier)
        return tier


def cache_measurements(
    cache: QueryCache, tiers: list[RedisTier]
) -> list[tuple[str, Labels, float]]:
    """Return the metrics of the in-process cache, and of the Redis tiers together."""
    rows: list[tuple[str, Labels, float]] = [
        ("omni_cache_hits", (), float(cache.hits)),
        ("omni_cache_misses", (), float(cache.misses)),
        ("omni_cache_evictions", (), float(cache.evictions)),
        ("omni_cache_entries", (), float(len(cache))),
        ("omni_cache_bytes", (), float(cache.size_bytes)),
    ]
    if tiers:
        rows += [
            ("omni_redis", ("hit",), float(sum(tier.hits for tier in tiers))),
            ("omni_redis", ("miss",), float(sum(tier.misses for tier in tiers))),
            ("omni_redis", ("failure",), float(sum(tier.failures for tier in tiers))),
            ("omni_redis", ("refused",), float(sum(tier.refused for tier in tiers))),
        ]
    return rows
