"""A token file with values of the wrong kind: refused by name, for a right must not come from a
typing mistake.
"""

from hashlib import sha256
from pathlib import Path

import pytest

from encoders.errors import ConfigError
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
def test_the_admin_right_is_true_or_false_and_nothing_else(tmp_path: Path, value: str) -> None:
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
def test_entity_types_are_a_list_of_strings_and_nothing_else(tmp_path: Path, value: str) -> None:
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
def test_what_is_well_formed_means_what_it_says(
    tmp_path: Path, line: str, types: set[str] | None, admin: bool
) -> None:
    caller = load(tmp_path, line).caller([("authorization", "Bearer secret")])
    assert (caller.name, caller.entity_types, caller.admin) == ("web", types, admin)
