"""A FastAPI server that answers one search as JSON: what one would write by hand around an index.

Run as ``python -m benchmarks.serving.fastapi_peer STORE VECTORS CACHED``: the query vectors are
computed beforehand (an ``npz`` of texts and vectors), so that no encoder is measured; ``CACHED`` is
1 if answers are cached, too. Prints its port as JSON.

As fast as FastAPI gets: one search is the same call of the index, answers are written by orjson and
cached as bytes, nothing runs in threads, and uvicorn has httptools, uvloop and no access log.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.releases.store import ReleaseStore
from retrieval.addresses import bound_socket


def create_app(store: Path, vectors_path: Path, *, are_cached: bool) -> Any:
    """Make the application."""
    import orjson
    from fastapi import FastAPI, HTTPException, Response
    from pydantic import BaseModel, Field

    class Question(BaseModel):
        query: str
        entityType: str
        k: int = Field(ge=1, le=1000)
        attributes: tuple[str, ...] = ()

    release = ReleaseStore(store).open_current()
    prepared = np.load(vectors_path)
    vectors = dict(zip(prepared["texts"].tolist(), prepared["vectors"], strict=True))
    cached: dict[tuple[str, str, int, tuple[str, ...]], bytes] = {}
    app = FastAPI()

    def search(question: Question) -> bytes:
        index = release.entities.get(question.entityType)
        vector = vectors.get(question.query)
        if index is None or vector is None:
            raise HTTPException(404, "unknown entity type or text")
        result = index.search(vector, question.k)
        attributes = index.attributes(result.ids, question.attributes)
        hits = [
            {"id": id_, "score": score, "attributes": values}
            for id_, score, values in zip(
                result.ids, result.scores.tolist(), attributes, strict=True
            )
        ]
        answer = {"hits": hits, "releaseId": release.release_id, "plan": result.plan}
        return orjson.dumps(answer)

    @app.post("/retrieve")  # type: ignore[untyped-decorator, unused-ignore]
    async def retrieve(question: Question) -> Response:
        if not are_cached:
            return Response(search(question), media_type="application/json")
        key = question.query, question.entityType, question.k, question.attributes
        found = cached.get(key)
        if found is None:
            found = cached[key] = search(question)
        return Response(found, media_type="application/json")

    return app


def main() -> None:
    """Serve until a signal comes."""
    import uvicorn

    store, vectors, are_cached = sys.argv[1:]
    app = create_app(Path(store), Path(vectors), are_cached=are_cached == "1")
    bound = bound_socket("127.0.0.1", 0, flag="--port")
    bound.listen(1024)  # who reads the port may call at once
    sys.stdout.write(json.dumps({"port": bound.getsockname()[1]}) + "\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
    uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    main()
