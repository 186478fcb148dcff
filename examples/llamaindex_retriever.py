"""A LlamaIndex retriever over an OmniSearchSage server; needs llama-index-core and the client.

retriever = OmniRetriever(RetrievalClient("localhost:50051"), entity_type="product")
nodes = retriever.retrieve("rain jacket")
"""

from __future__ import annotations

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from retrieval import RetrievalClient


class OmniRetriever(BaseRetriever):
    """Finds entities of one type; a node is a hit's text with its attributes as metadata.

    Args:
        client: Of the server.
        entity_type: What to find.
        k: Nodes wanted.
        filter: Expression over attributes; empty: none.
        text_attributes: Attributes that make a node's text, a line each where a hit has them.
    """

    def __init__(
        self,
        client: RetrievalClient,
        entity_type: str = "pin",
        k: int = 10,
        filter: str = "",
        text_attributes: tuple[str, ...] = ("title", "description"),
    ) -> None:
        super().__init__()
        self._client = client
        self._entity_type = entity_type
        self._k = k
        self._filter = filter
        self._text_attributes = text_attributes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        answer = self._client.retrieve(
            query_bundle.query_str,
            self._entity_type,
            self._k,
            filter=self._filter,
            attributes=["*"],
        )
        nodes = []
        for hit in answer.hits:
            lines = [str(hit.attributes[n]) for n in self._text_attributes if n in hit.attributes]
            text = "\n".join(lines) or hit.id
            node = TextNode(id_=hit.id, text=text, metadata=dict(hit.attributes))
            nodes.append(NodeWithScore(node=node, score=hit.score))
        return nodes
