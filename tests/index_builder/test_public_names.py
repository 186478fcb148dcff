"""Public names of the package."""

from __future__ import annotations

import subprocess
import sys

import index_builder


def test_public_names_are_pinned_and_importable() -> None:
    assert index_builder.__all__ == ["ReleaseStore"]
    assert set(index_builder.__all__) <= set(dir(index_builder))
    from index_builder import ReleaseStore
    from index_builder.releases import store

    assert ReleaseStore is store.ReleaseStore


def test_import_of_the_package_loads_no_library() -> None:
    code = (
        "import sys, index_builder;"
        "print(*{'hnswlib', 'numpy', 'polars', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
