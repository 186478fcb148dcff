"""The public names of the package: pinned, importable, and loaded only when they are used."""

import subprocess
import sys

import pytest

import retrieval
import retrieval.client


def test_retrieval_public_names_are_pinned_and_importable() -> None:
    assert retrieval.__all__ == ["AsyncRetrievalClient", "RetrievalClient"]
    assert retrieval.RetrievalClient is retrieval.client.RetrievalClient
    assert retrieval.AsyncRetrievalClient is retrieval.client.AsyncRetrievalClient
    assert set(retrieval.__all__) <= set(dir(retrieval))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        retrieval.Nothing  # noqa: B018


def test_client_public_names_are_pinned_and_importable() -> None:
    assert retrieval.client.__all__ == [
        "AsyncRetrievalClient",
        "CallError",
        "ClientConfig",
        "EntityWrite",
        "Hit",
        "RetrievalClient",
        "RetryPolicy",
        "Target",
        "TlsConfig",
    ]
    assert all(hasattr(retrieval.client, name) for name in retrieval.client.__all__)


def test_client_errors_old_path_holds_the_same_classes() -> None:
    from retrieval import client_errors
    from retrieval.client import errors

    assert all(getattr(client_errors, name) is getattr(errors, name) for name in errors.__all__)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import retrieval", ["grpc", "torch", "numpy", "google.protobuf"]),
        ("from retrieval import RetrievalClient, AsyncRetrievalClient", ["torch", "hnswlib"]),
    ],
)
def test_import_loads_no_heavy_library(statement: str, absent: list[str]) -> None:
    script = f"{statement}; import sys; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
