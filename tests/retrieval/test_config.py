"""Settings of a server."""

from pathlib import Path

import pytest

from encoders.errors import ConfigError
from retrieval.config import ServeConfig


@pytest.mark.parametrize(
    "settings_",
    [
        {"port": 70_000},
        {"workers": 0},
        {"shadow_fraction": 1.5},
        {"device": "tpu"},
        {"tls_cert": Path("x")},
        {"cache_ttl_seconds": 0},
    ],
)
def test_serve_config_impossible_value_is_refused_by_name(settings_: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ServeConfig(releases=Path("."), **settings_)
