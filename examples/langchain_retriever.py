"""A LangChain retriever over an OmniSearchSage server; needs langchain-core and the client.

retriever = OmniRetriever(client=RetrievalClient("localhost:50051"), entity_type="product")
documents = retriever.invoke("rain jacket")
"""

from __future__ import annotations

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from retrieval import RetrievalClient


class OmniRetriever(BaseRetriever):
    """Finds entities of one type; a document is a hit's text with its attributes as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    client: RetrievalClient
    entity_type: str = "pin"
    k: int = 10
    filter: str = ""
    text_attributes: tuple[str, ...] = ("title", "description")
    """Attributes that make a document's text, a line each where a hit has them."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        answer = self.client.retrieve(
            query, self.entity_type, self.k, filter=self.filter, attributes=["*"]
        )
        documents = []
        for hit in answer.hits:
            lines = [str(hit.attributes[n]) for n in self.text_attributes if n in hit.attributes]
            metadata = {**hit.attributes, "score": hit.score, "release_id": answer.release_id}
            text = "\n".join(lines) or hit.id
            documents.append(Document(id=hit.id, page_content=text, metadata=metadata))
        return documents
