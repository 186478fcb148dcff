"""The configuration of a server: flags over variables over a file over defaults."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from retrieval.commands.serve import command
from retrieval.commands.serve_config import merged, read_config_file
from retrieval.config import Limits, ServeConfig


def run(*arguments: str, **variables: str) -> Result:
    return CliRunner(env={"OMNI_STORE": None, **variables}).invoke(command, arguments)


def printed(*arguments: str, **variables: str) -> dict[str, Any]:
    result = run(*arguments, "--print-config", **variables)
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(
        'releases = "store"\nport = 1234\ncache_bytes = 1000\nmax_streams_per_connection = 7\n'
        'metrics_port = false\nallowed_hosts = ["a", "b"]\ncache_ttl_seconds = 60\n'
        "[limits]\nmax_k = 11\nmax_batch = 12\nmax_score_ids = 13\n"
    )
    return path


def test_print_config_shows_every_setting_and_is_read_again(tmp_path: Path) -> None:
    content = printed("--store", "store", "--max-k", "77", "--redis-secret", "hidden")
    unset = {"probe_port", "remote_store", "redis_url", "impression_log", "otlp_endpoint"}
    unset |= {"tls_cert", "tls_key", "tls_client_ca", "tokens", "redis_secret"}
    assert set(content) | unset >= {field.name for field in fields(ServeConfig)}
    assert set(content["limits"]) == {field.name for field in fields(Limits)}
    assert content["limits"]["max_k"] == 77 and "hidden" not in str(content)
    path = tmp_path / "printed.toml"
    path.write_text(run("--store", "store", "--max-k", "77", "--print-config").stdout)
    assert printed("--config", str(path)) == content


def test_print_config_keeps_switched_off_what_a_flag_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "printed.toml"
    path.write_text(run("--store", "store", "--metrics-port", "-1", "--print-config").stdout)
    assert printed("--config", str(path))["metrics_port"] is False
    assert merged({"limits": {}}, read_config_file(path), ()).metrics_port is None


def test_print_config_leaves_a_url_with_a_password_out() -> None:
    secret = printed("--store", "store", "--redis", "redis://me:hidden@host:6379/0")
    assert "redis_url" not in secret and "hidden" not in str(secret)
    plain = printed("--store", "store", "--redis", "redis://host:6379/0")
    assert plain["redis_url"] == "redis://host:6379/0"


def test_file_reaches_every_setting_and_flags_and_variables_win(file: Path) -> None:
    found = printed("--config", str(file))
    assert (found["port"], found["cache_bytes"], found["max_streams_per_connection"]) == (
        1234,
        1000,
        7,
    )
    assert found["metrics_port"] is False and found["allowed_hosts"] == ["a", "b"]
    assert found["cache_ttl_seconds"] == 60.0 and found["limits"]["max_score_ids"] == 13
    given = ("--config", str(file), "--port", "9", "--cache-mib", "1", "--max-k", "5")
    found = printed(*given, OMNI_SERVE_MAX_BATCH="6", OMNI_SERVE_METRICS_PORT="77")
    assert (found["port"], found["cache_bytes"], found["metrics_port"]) == (9, 2**20, 77)
    assert (found["limits"]["max_k"], found["limits"]["max_batch"]) == (5, 6)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prot = 1", "prot: no such setting"),
        ('port = "1"', "port: expected a whole number"),
        ("port = 1.5", "port: expected a whole number"),
        ("port = true", "port: expected a whole number"),
        ('access_log = "yes"', "access_log: expected true or false"),
        ('allowed_hosts = "a"', "allowed_hosts: expected a list"),
        ("host = 1", "host: expected a text"),
        ("port = 70000", "port: expected 0 to 65535"),
        ('host = "0.0.0.0"', "--insecure"),
        ("limits = 3", "limits: expected a table"),
        ("[limits]\nmax_kk = 3", "limits.max_kk: no such setting"),
        ("[limits]\nmax_k = 0", "max_k: expected a positive number"),
        ("port =", "cannot read"),
    ],
)
def test_file_with_a_mistake_is_refused_by_name(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'releases = "store"\n{line}\n')
    result = run("--config", str(path))
    assert result.exit_code == 2 and words in " ".join(result.output.split())


def test_server_without_a_store_is_refused() -> None:
    result = run("--print-config")
    assert result.exit_code == 2 and "--store" in result.output


def test_store_url_becomes_the_remote_store_and_a_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = printed("--store", "s3://bucket/shop/")
    assert found["remote_store"] == "s3://bucket/shop"
    assert Path(found["releases"]).is_relative_to(tmp_path)
    assert printed("--store", "s3://bucket/shop")["releases"] == found["releases"]
    assert printed("--store", "s3://bucket/toys")["releases"] != found["releases"]
    named = printed("--store", "s3://bucket/shop", "--store-cache", "here")
    assert (named["releases"], named["remote_store"]) == ("here", "s3://bucket/shop")
    assert printed(OMNI_STORE="gs://bucket/x")["remote_store"] == "gs://bucket/x"


def test_store_url_in_a_file_is_followed_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('releases = "s3://bucket/shop"\n')
    assert printed("--config", str(path))["remote_store"] == "s3://bucket/shop"
    found = printed("--config", str(path), "--store-cache", "here")
    assert (found["releases"], found["remote_store"]) == ("here", "s3://bucket/shop")
    path.write_text('releases = "cache"\nremote_store = "s3://bucket/shop"\n')
    found = printed("--config", str(path))
    assert (found["releases"], found["remote_store"]) == ("cache", "s3://bucket/shop")
    found = printed("--config", str(path), "--store", "folder")
    assert (found["releases"], found.get("remote_store")) == ("folder", None)


def test_store_cache_without_a_url_is_refused() -> None:
    result = run("--store", "folder", "--store-cache", "here", "--print-config")
    assert result.exit_code == 2 and "expected a URL" in result.output
