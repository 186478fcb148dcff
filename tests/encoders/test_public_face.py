"""The public names of the package: pinned, importable, and loaded only when they are used."""

import subprocess
import sys

import pytest

import encoders


def test_encoders_public_names_are_pinned_and_importable() -> None:
    from encoders.towers.bundle import load_bundle
    from encoders.training.loop import train

    assert encoders.__all__ == ["load_bundle", "train"]
    assert encoders.load_bundle is load_bundle
    assert encoders.train is train
    assert set(encoders.__all__) <= set(dir(encoders))


def test_encoders_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        encoders.Nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import encoders", ["torch", "numpy", "polars", "transformers"]),
        ("import encoders; dir(encoders)", ["torch", "numpy", "polars", "transformers"]),
        ("from encoders import load_bundle", ["encoders.training.loop"]),
    ],
)
def test_import_loads_no_heavy_library(statement: str, absent: list[str]) -> None:
    script = f"{statement}; import sys; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
