"""Live logs: writers that are interrupted between writing and syncing, and folding in one step."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from index_builder.building.inputs import EntityInput
from index_builder.building.live_fold import apply_live
from index_builder.building.order import LiveWrites, decide
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter


@contextmanager
def before_sync(writer: LiveLogWriter, action: Callable[[], None]) -> Iterator[LiveLogWriter]:
    """Call ``action`` between write and fsync of every append inside the block."""
    end = writer._end
    sync = end._sync

    def act_and_sync() -> None:
        action()
        sync()

    end._sync = act_and_sync  # type: ignore[method-assign]
    try:
        yield writer
    finally:
        end._sync = sync  # type: ignore[method-assign]


def kill_before_sync(root: Path, dimension: int, entries: Sequence[LiveEntry]) -> None:
    """Let a process write entries and die before it syncs: whole, but not acknowledged."""
    child = os.fork()
    if child == 0:
        with before_sync(LiveLogWriter(root, "pin", dimension), lambda: os._exit(9)) as writer:
            writer.write(entries)
    os.waitpid(child, 0)


def fold_live(entities: EntityInput, live: LiveWrites, into: Path) -> EntityInput:
    """Decide about live writes and apply them; as ``apply_live``."""
    return apply_live(entities, decide(entities, live), into)
