"""Collecting a store at a URL: old releases at once, packs that nothing uses after a day of grace.

A pack that nothing uses is only noted at first (object ``garbage``): a push under way may be about
to use it. A later collection removes what has stayed unused for the time of grace.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from index_builder.errors import ReleaseCorrupt, ReleaseError
from index_builder.releases.manifest import publish_number
from index_builder.releases.summary import ReleaseSummary
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.recipe import PACKS, RELEASES, Recipe, read_current, read_recipe

GARBAGE = "garbage"
GRACE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection has removed, or would.

    Attributes:
        releases: Ids.
        packs: Names of packs that are gone.
        freed_bytes: Of them.
        waiting_packs: Packs that nothing uses and whose time of grace runs.
    """

    releases: tuple[str, ...]
    packs: tuple[str, ...]
    freed_bytes: int
    waiting_packs: int


def list_remote(remote: ObjectStore) -> list[ReleaseSummary]:
    """Summarise the releases at a URL, in the order in which they were published.

    Raises:
        RemoteUnreachable: The store does not answer.
        ReleaseCorrupt: Its ``CURRENT``, or a recipe, is damaged.
    """
    current = read_current(remote)
    active = None if current is None else current.release_id
    return [
        ReleaseSummary.of(recipe.manifest, recipe.manifest.release_id == active)
        for recipe in _recipes(remote)
    ]


def _recipes(remote: ObjectStore) -> list[Recipe]:
    recipes = [read_recipe(remote, name) for name in remote.sizes(RELEASES)]
    return sorted(
        recipes, key=lambda recipe: (publish_number(recipe.manifest), recipe.manifest.release_id)
    )


def collect_remote(
    remote: ObjectStore,
    keep: int,
    *,
    dry_run: bool = False,
    grace_seconds: float = GRACE_SECONDS,
) -> Collected:
    """Remove old releases at a URL, and packs that no release has used for the time of grace.

    Kept are the active release, the one active before it, and the newest ``keep``. A push must not
    take longer than the grace; only one collection may run at a time.

    Args:
        remote: The store.
        keep: How many of the newest releases stay, at least 1.
        dry_run: Only say what would go.
        grace_seconds: How long a pack stays that nothing uses.

    Raises:
        ReleaseCorrupt: ``CURRENT`` or a recipe is damaged: nothing was removed.
        RemoteUnreachable: The store does not answer.
    """
    if keep < 1:
        raise ReleaseError(f"--keep: expected at least 1 release, but got {keep}")
    recipes = {recipe.manifest.release_id: recipe for recipe in _recipes(remote)}
    stay = set(list(recipes)[-keep:])
    current = read_current(remote)
    if current is not None:
        stay.update((current.release_id, *current.history[:1]))
    old = tuple(name for name in recipes if name not in stay)
    used = {pack for name in stay & recipes.keys() for pack in recipes[name].packs}
    sizes = remote.sizes(PACKS)
    now = time.time()
    noted = _noted(remote)
    unused = {name: min(noted.get(name, now), now) for name in sizes if name not in used}
    due = tuple(name for name, since in unused.items() if now - since >= grace_seconds)
    if not dry_run:
        remote.remove(f"{RELEASES}/{name}" for name in old)
        remote.remove(f"{PACKS}/{name}" for name in due)
        waiting = {name: since for name, since in unused.items() if name not in due}
        remote.put(GARBAGE, json.dumps(waiting, sort_keys=True).encode())
    return Collected(
        releases=old,
        packs=due,
        freed_bytes=sum(sizes[name] for name in due),
        waiting_packs=len(unused) - len(due),
    )


def _noted(remote: ObjectStore) -> dict[str, float]:
    """Return since when packs are known to be unused."""
    try:
        values = json.loads(remote.get(GARBAGE))
        return {str(name): float(since) for name, since in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ReleaseCorrupt(
            f"{remote.url}/{GARBAGE} was changed or cut; remove it: the time of grace begins again"
        ) from error
