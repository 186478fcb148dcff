"""The calls of the service ``Admin``: activate, roll back, upsert, delete."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from encoders.errors import SpaceMismatch
from index_builder.errors import BadAttribute, UnknownEntityType
from index_builder.filters.json_values import check_attributes, learn_types
from index_builder.live_log.records import LiveEntry
from protos import retrieval_pb2 as pb
from retrieval.config import ServeConfig
from retrieval.errors import InvalidRequest, WritesDisabled
from retrieval.releases.live_writes import LiveWrites
from retrieval.releases.manager import LiveReleases, ReleaseChange
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.calls import CallInfo
from retrieval.service.validation import checked_embedding, checked_id, from_value, require_count

log = logging.getLogger(__name__)

ChangeRelease = Callable[[str], Awaitable[ReleaseChange]]
"""Carries out Activate of a release id, or Rollback for an empty one."""


class AdminService:
    """Activates releases and takes live writes. Methods run on the event loop of one worker.

    Args:
        config: Limits, and whether writes are taken.
        releases: What Activate and Rollback change.
        change_release: Carries them out (a supervisor's, when there are several workers); None:
            ``releases`` does.
    """

    def __init__(
        self,
        config: ServeConfig,
        releases: LiveReleases,
        change_release: ChangeRelease | None,
    ) -> None:
        self.config = config
        self.limits = config.limits
        self.releases = releases
        self.change_release = change_release
        self.writes = LiveWrites(releases.store.live_root)
        self._written: tuple[str, dict[str, dict[str, str]]] = ("", {})

    def close(self) -> None:
        """Give the live log back."""
        self.writes.close()

    async def activate(self, message: pb.ActivateRequest, call: CallInfo) -> pb.ActivateResponse:
        """Serve another release."""
        if not message.release_id:
            raise InvalidRequest(
                "release_id: expected the id of a published release, but got none. `omni release"
                " list` shows them."
            )
        # A supervisor is not asked to load what does not exist
        self.releases.check_published(message.release_id)
        return await self._change(message.release_id, call)

    async def rollback(self, message: pb.RollbackRequest, call: CallInfo) -> pb.ActivateResponse:
        """Serve the previously active release again."""
        return await self._change("", call)

    async def _change(self, release_id: str, call: CallInfo) -> pb.ActivateResponse:
        if self.change_release is not None:
            changing = self.change_release(release_id)
        elif release_id:
            changing = self.releases.activate(release_id)
        else:
            changing = self.releases.rollback()
        # A swap that has begun is carried through even if the caller goes away
        change = await asyncio.shield(asyncio.ensure_future(changing))
        log.info(
            "%s: release %s -> %s",
            call.caller.name,
            change.previous_release_id,
            change.release_id,
        )
        return pb.ActivateResponse(
            release_id=change.release_id,
            previous_release_id=change.previous_release_id,
            total_ns=time.perf_counter_ns() - call.started_ns,
        )

    async def upsert(self, message: pb.UpsertRequest, call: CallInfo) -> pb.WriteResponse:
        """Insert or replace entities, all or none."""
        serving = self._writable(message.entity_type)
        require_count("entities", len(message.entities), self.limits.max_batch)
        if not message.space_id:
            raise InvalidRequest(
                "space_id: expected the space id that made the embeddings, but got none."
            )
        if message.space_id != serving.space_id:
            raise SpaceMismatch(serving.space_id, message.space_id, "space_id")
        names = {name for entity in message.entities for name in entity.attributes}
        types = serving.entities[message.entity_type].attribute_types(names)
        types = {**self._new_types(serving, message.entity_type), **types}
        entries = [
            _checked_entry(entity, f"entities[{row}]", message.space_id, serving, types)
            for row, entity in enumerate(message.entities)
        ]
        for entry in entries:
            learn_types(self._new_types(serving, message.entity_type), entry.attributes)
        return await self._write(serving, message.entity_type, entries)

    def _new_types(self, serving: ServingRelease, entity_type: str) -> dict[str, str]:
        """Return the types of attributes that this server wrote, which may not be visible yet."""
        if self._written[0] != serving.release_id:
            self._written = (serving.release_id, {})
        return self._written[1].setdefault(entity_type, {})

    async def delete(self, message: pb.DeleteRequest, call: CallInfo) -> pb.WriteResponse:
        """Remove entities."""
        serving = self._writable(message.entity_type)
        require_count("ids", len(message.ids), self.limits.max_batch)
        entries = [
            LiveEntry(id=checked_id(id_, f"ids[{row}]")) for row, id_ in enumerate(message.ids)
        ]
        return await self._write(serving, message.entity_type, entries)

    def _writable(self, entity_type: str) -> ServingRelease:
        """Return the active release, if it has the type and this server takes writes."""
        serving = self.releases.resolve("")
        if entity_type not in serving.entities:
            raise UnknownEntityType(entity_type[:64], list(serving.entities))
        if not self.config.accept_writes:
            raise WritesDisabled(
                "this server takes no live writes (--read-only). Write to another one, or use `omni"
                " update`."
            )
        if self.config.remote_store is not None:
            raise WritesDisabled(
                f"this server serves the releases of {self.config.remote_store} and has no live log"
                " of theirs. Write where they are built."
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


def _checked_entry(
    entity: pb.Entity, where: str, space_id: str, serving: ServingRelease, types: dict[str, str]
) -> LiveEntry:
    """Read one entity of an upsert; ``where`` names it in errors.

    ``types`` of attributes hold for it, and learn those of its new ones.
    """
    vector = checked_embedding(
        entity.embedding, space_id, serving.dimension, serving.space_id, f"{where}.embedding"
    )
    attributes = {name: from_value(value) for name, value in entity.attributes.items()}
    try:
        check_attributes(attributes, types, where)
    except BadAttribute as error:
        raise InvalidRequest(str(error)) from error
    learn_types(types, attributes)
    return LiveEntry(
        id=checked_id(entity.id, f"{where}.id"),
        vector=vector.copy(),
        space_id=space_id,
        attributes=attributes,
    )
