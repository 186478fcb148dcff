"""The retrievers under examples/ with the real frameworks, on a real server."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from retrieval import RetrievalClient
from retrieval.client import ClientConfig
from tests.helpers.serving.real_server import Running

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENT = ClientConfig(deadline_seconds=50)


def retriever_class(file: str, package: str) -> Any:
    pytest.importorskip(package, reason=f"{package} is not installed: the extra `examples`")
    return runpy.run_path(str(EXAMPLES / file))["OmniRetriever"]


@pytest.mark.slow
def test_langchain_retriever_returns_the_hits_as_documents(running_server: Running) -> None:
    retriever = retriever_class("langchain_retriever.py", "langchain_core")
    with RetrievalClient(running_server.address, PATIENT) as client:
        documents = retriever(client=client, entity_type="product", k=4).invoke("red cat")
        expected = client.retrieve("red cat", "product", 4, attributes=["*"])
    assert [document.id for document in documents] == expected.ids
    for document, hit in zip(documents, expected.hits, strict=True):
        assert document.page_content == hit.attributes.get("title", hit.id)
        assert document.metadata.items() >= hit.attributes.items()
        assert document.metadata["release_id"] == running_server.release_id


@pytest.mark.slow
def test_llamaindex_retriever_returns_the_hits_as_nodes(running_server: Running) -> None:
    retriever = retriever_class("llamaindex_retriever.py", "llama_index.core")
    with RetrievalClient(running_server.address, PATIENT) as client:
        nodes = retriever(client, entity_type="product", k=4).retrieve("red cat")
        expected = client.retrieve("red cat", "product", 4, attributes=["*"])
    assert [node.node.node_id for node in nodes] == expected.ids
    assert [node.score for node in nodes] == [hit.score for hit in expected.hits]
    assert nodes[0].get_content() == expected.hits[0].attributes.get("title", expected.ids[0])
