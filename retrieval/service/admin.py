"""The calls of the Admin service: activate, roll back, upsert, delete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from encoders.errors import SpaceMismatch
from index_builder.errors import BadAttribute, UnknownEntityType
from index_builder.filters.json_values import check_attributes
from index_builder.live_log.records import LiveEntry
from protos import retrieval_pb2 as pb
from retrieval.config import ServeConfig
from retrieval.errors import InvalidRequest, WritesDisabled
from retrieval.releases.live_writes import LiveWrites
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import Caller
from retrieval.service.validation import checked_embedding, checked_id, from_value, require_count

log = logging.getLogger("omni.service")

Context = Any


class Changes:
    """Admin calls of one worker; methods run on its event loop.

    Args:
        config: Limits, and whether writes are taken.
        releases: What Activate and Rollback change.
        change_release: Carries them out instead (a supervisor, when there are several workers).
    """

    def __init__(
        self,
        config: ServeConfig,
        releases: LiveReleases,
        change_release: Callable[[str], Awaitable[tuple[str, str]]] | None,
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.releases = releases
        self.change_release = change_release
        self.writes = LiveWrites(releases.store.live_root)

    def close(self) -> None:
        """Give the live log back."""
        self.writes.close()

    async def activate(
        self, request: pb.ActivateRequest, context: Context, caller: Caller, started: int
    ) -> pb.ActivateResponse:
        """Serve another release."""
        if not request.release_id:
            raise InvalidRequest(
                "release_id: expected the id of a published release, but got none. `omni release"
                " list` shows them."
            )
        self.releases.check_published(
            request.release_id
        )  # here, because a supervisor is not asked for what there is not
        return await self._change(request.release_id, caller, started)

    async def rollback(
        self, request: pb.RollbackRequest, context: Context, caller: Caller, started: int
    ) -> pb.ActivateResponse:
        """Serve the release that was active before."""
        return await self._change("", caller, started)

    async def _change(self, release_id: str, caller: Caller, started: int) -> pb.ActivateResponse:
        if self.change_release is not None:
            change = self.change_release(release_id)
        elif release_id:
            change = self.releases.activate(release_id)
        else:
            change = self.releases.rollback()
        # A swap that has begun is carried through even if the caller goes away.
        now, before = await asyncio.shield(asyncio.ensure_future(change))
        log.info("%s: release %s -> %s", caller.name, before, now)
        return pb.ActivateResponse(
            release_id=now, previous_release_id=before, total_ns=time.perf_counter_ns() - started
        )

    async def upsert(
        self, request: pb.UpsertRequest, context: Context, caller: Caller, started: int
    ) -> pb.WriteResponse:
        """Insert or replace entities, all or none."""
        serving = self._writable(request.entity_type)
        require_count("entities", len(request.entities), self.limits.max_batch)
        if not request.space_id:
            raise InvalidRequest(
                "space_id: expected the space id that made the embeddings, but got none."
            )
        if request.space_id != serving.space_id:
            raise SpaceMismatch(serving.space_id, request.space_id, "space_id")
        known_types = serving.entities[request.entity_type].attribute_table.schema
        entries = []
        for row, entity in enumerate(request.entities):
            vector = checked_embedding(
                entity.embedding,
                request.space_id,
                serving.dimension,
                serving.space_id,
                f"entities[{row}].embedding",
            )
            attributes = {name: from_value(value) for name, value in entity.attributes.items()}
            try:
                check_attributes(attributes, known_types, f"entities[{row}]")
            except BadAttribute as error:
                raise InvalidRequest(str(error)) from error
            entries.append(
                LiveEntry(
                    id=checked_id(entity.id, f"entities[{row}].id"),
                    vector=vector.copy(),
                    space_id=request.space_id,
                    attributes=attributes,
                )
            )
        return await self._write(serving, request.entity_type, entries)

    async def delete(
        self, request: pb.DeleteRequest, context: Context, caller: Caller, started: int
    ) -> pb.WriteResponse:
        """Remove entities."""
        serving = self._writable(request.entity_type)
        require_count("ids", len(request.ids), self.limits.max_batch)
        entries = [
            LiveEntry(id=checked_id(id, f"ids[{row}]")) for row, id in enumerate(request.ids)
        ]
        return await self._write(serving, request.entity_type, entries)

    def _writable(self, entity_type: str) -> ServingRelease:
        serving = self.releases.resolve("")
        if entity_type not in serving.entities:
            raise UnknownEntityType(entity_type[:64], list(serving.entities))
        if not self.config.accept_writes:
            raise WritesDisabled(
                "this server takes no live writes (--read-only). Write to another one, or use `omni"
                " update`."
            )
        return serving

    async def _write(
        self, serving: ServingRelease, entity_type: str, entries: list[LiveEntry]
    ) -> pb.WriteResponse:
        after = serving.release.manifest.entities[entity_type].watermark
        write = asyncio.ensure_future(
            asyncio.to_thread(
                self.writes.write, entity_type, serving.dimension, entries, after=after
            )
        )
        return pb.WriteResponse(sequence=await asyncio.shield(write), applied=len(entries))
