"""Tokens, the rights that they hold, and token files with mistakes."""

from hashlib import sha256
from pathlib import Path

import pytest

from encoders.errors import ConfigError
from retrieval.errors import PermissionDenied, Unauthenticated
from retrieval.security import Tokens

DIGEST = sha256(b"secret").hexdigest()


def load(folder: Path, line: str) -> Tokens:
    """A file of two tokens; the second, ``web``, holds the line."""
    first = f'[[token]]\nname = "ops"\nsha256 = "{"ab" * 32}"\nadmin = true\n'
    (folder / "tokens.toml").write_text(
        f'{first}[[token]]\nname = "web"\nsha256 = "{DIGEST}"\n{line}\n'
    )
    return Tokens.load(folder / "tokens.toml")


@pytest.mark.parametrize("value", ['"false"', '"true"', "0", "1", "[]", "1.0"])
def test_token_file_admin_not_boolean_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"tokens\.toml: token 2 \('web'\): admin: expected true or false, but got .*without"
            r" quotes"
        ),
    ):
        load(tmp_path, f"admin = {value}")


@pytest.mark.parametrize(
    "value", ['"pin"', "true", "1", '["pin", 1]', '[["pin"]]', '{pin = "product"}']
)
def test_token_file_entity_types_not_strings_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"tokens\.toml: token 2 \('web'\): entity_types: expected a list .*\[\"pin\","
            r" \"product\"\]"
        ),
    ):
        load(tmp_path, f"entity_types = {value}")


@pytest.mark.parametrize(
    ("line", "types", "admin"),
    [
        ("", None, False),
        ("admin = false", None, False),
        ("admin = true", None, True),
        ('entity_types = ["pin", "ad"]', {"pin", "ad"}, False),
        ("entity_types = []", set(), False),
    ],
)
def test_token_file_well_formed_gives_its_rights(
    tmp_path: Path, line: str, types: set[str] | None, admin: bool
) -> None:
    caller = load(tmp_path, line).caller([("authorization", "Bearer secret")])
    assert (caller.name, caller.entity_types, caller.admin) == ("web", types, admin)


def test_tokens_known_token_has_its_rights_and_no_other_gets_in(tmp_path: Path) -> None:
    digest = sha256(b"web-secret").hexdigest()
    (tmp_path / "t.toml").write_text(
        f'[[token]]\nname = "web"\nsha256 = "{digest}"\nentity_types = ["pin"]\n'
    )
    tokens = Tokens.load(tmp_path / "t.toml")
    caller = tokens.caller([("user-agent", "x"), ("authorization", "Bearer web-secret")])
    caller.require_entity_types(["pin"])
    with pytest.raises(PermissionDenied, match="may retrieve pin"):
        caller.require_entity_types(["pin", "ad"])
    with pytest.raises(PermissionDenied, match="admin"):
        caller.require_admin()
    for metadata in (
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Basic web-secret")],
        [("authorization", digest)],
    ):
        with pytest.raises(Unauthenticated):
            tokens.caller(metadata)
    for content in (
        "",
        "[[token]]\nname='a'",
        "[[token]]\nname='a'\nsha256='00'",
        "not toml",
        f"[[token]]\nname='a'\nsha256='{digest}'\nadmn=true",
    ):
        (tmp_path / "bad.toml").write_text(content)
        with pytest.raises(ConfigError):
            Tokens.load(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rate = 0", "rate: expected a number above 0"),
        ('rate = "100"', "rate: expected a number above 0"),
        ("rate = true", "rate: expected a number above 0"),
        ("rate = nan", "rate: expected a number above 0"),
        ("burst = 5", "burst: expected a rate beside it"),
        ("rate = 5\nburst = -1", "burst: expected a number above 0"),
    ],
)
def test_token_file_wrong_rate_is_refused(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"token 2 \('web'\): {words}"):
        load(tmp_path, line)


def test_token_file_rate_bounds_its_token_alone(tmp_path: Path) -> None:
    caller = load(tmp_path, "rate = 2\nburst = 3").caller([("authorization", "Bearer secret")])
    assert caller.rate is not None
    assert [caller.rate.try_take() for _ in range(4)] == [True, True, True, False]
    assert load(tmp_path, "").caller([("authorization", "Bearer secret")]).rate is None


@pytest.mark.parametrize(
    "content", ["token = 5", "token = [5]", 'token = "x"', "[token]\nname = 1"]
)
def test_token_file_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"tokens\.toml: token: expected tables"):
        Tokens.load(tmp_path / "tokens.toml")
