"""Compare and describe releases: answers, scores, norms, entities added and removed."""

from __future__ import annotations

from typing import Any

import numpy as np

from index_builder.releases.golden import GoldenQueries
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import EntityIndex

_SAMPLE = 5
"""Ids named of those added and of those removed."""
_COMPARED_VECTORS = 2000
_UNCHANGED_COSINE = 0.9999
_SHOWN_TEXTS = 3
_BLOCK_ROWS = 65_536


def diff_releases(store: ReleaseStore, before_id: str, after_id: str) -> dict[str, Any]:
    """Compare two releases of a store; both are verified and opened.

    Args:
        store: Where they are.
        before_id: Usually the active one.
        after_id: Usually the one to activate.

    Returns:
        JSON: whether the space is the same, and per entity type the counts, ids added and removed,
            overlap@10 of golden queries, drift of scores and norms. Golden queries with equal texts
            are compared through their own vectors; where the space is the same, the older
            release's golden vectors are put to both.

    Raises:
        ReleaseError: One of them cannot be opened.
    """
    with store.open(before_id) as before, store.open(after_id) as after:
        same_space = before.space_id == after.space_id
        types = sorted({*before.entities, *after.entities})
        return {
            "before": before_id,
            "after": after_id,
            "same_space": same_space,
            "bytes": {
                "before": before.manifest.total_bytes(),
                "after": after.manifest.total_bytes(),
            },
            "entities": {name: _diff_entity(name, before, after, same_space) for name in types},
        }


def _diff_entity(name: str, before: Release, after: Release, same_space: bool) -> dict[str, Any]:
    old, new = before.entities.get(name), after.entities.get(name)
    if old is None or new is None:
        present = new if old is None else old
        assert present is not None, "the name came from one of the two"
        return {"only_in": "after" if old is None else "before", "count": present.count}
    old_ids, new_ids = _ids(old), _ids(new)
    added, removed = sorted(new_ids - old_ids), sorted(old_ids - new_ids)
    result: dict[str, Any] = {
        "count": {"before": old.count, "after": new.count},
        "kind": {"before": old.kind, "after": new.kind},
        "added": {"count": len(added), "sample": added[:_SAMPLE]},
        "removed": {"count": len(removed), "sample": removed[:_SAMPLE]},
        "norms": {"before": norm_summary(old), "after": norm_summary(new)},
    }
    result |= _golden_drift(old, new, before.golden(name), after.golden(name), same_space)
    if same_space:
        result["moved"] = _moved(old, new, sorted(old_ids & new_ids))
    return result


def _moved(old: EntityIndex, new: EntityIndex, kept: list[str]) -> dict[str, Any]:
    """Compare the vectors of a sample of the ids that both releases hold."""
    places = np.linspace(0, len(kept) - 1, min(_COMPARED_VECTORS, len(kept))) if kept else ()
    cosines = []
    for place in places:
        before, after = old.vector(kept[int(place)]), new.vector(kept[int(place)])
        if before is not None and after is not None:
            cosines.append(float(before @ after))
    return {
        "sampled": len(cosines),
        "changed": sum(cosine < _UNCHANGED_COSINE for cosine in cosines),
        "cosine_mean": round(float(np.mean(cosines)), 5) if cosines else None,
    }


def _ids(index: EntityIndex) -> set[str]:
    return set(index.ids.take(np.arange(len(index.ids))))


def _golden_drift(
    old: EntityIndex,
    new: EntityIndex,
    old_golden: GoldenQueries,
    new_golden: GoldenQueries,
    same_space: bool,
) -> dict[str, Any]:
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    by_text = {text: row for row, text in enumerate(new_golden.texts) if text}
    for row, text in enumerate(old_golden.texts):
        if text in by_text:
            pairs.append((old_golden.vectors[row], new_golden.vectors[by_text[text]]))
        elif same_space:
            pairs.append((old_golden.vectors[row], old_golden.vectors[row]))
    if not pairs or not len(old.ids) or not len(new.ids):
        return {"golden": {"queries": 0, "overlap_at_10": None}}
    overlaps, drift, top = [], [], []
    for old_vector, new_vector in pairs:
        was, now = old.search(old_vector, 10, exact=True), new.search(new_vector, 10, exact=True)
        overlaps.append(len(set(was.ids) & set(now.ids)) / max(len(was.ids), len(now.ids), 1))
        drift.append(float(np.mean(now.scores)) - float(np.mean(was.scores)))
        top.append(was.ids[:1] == now.ids[:1])
    return {
        "golden": {
            "queries": len(pairs),
            "overlap_at_10": round(float(np.mean(overlaps)), 4),
            "same_first_answer": round(float(np.mean(top)), 4),
            "score_drift_mean": round(float(np.mean(drift)), 5),
            "score_drift_max": round(float(np.max(np.abs(drift))), 5),
        }
    }


def norm_summary(index: EntityIndex) -> dict[str, float]:
    """Return the smallest, mean and largest norm of the stored vectors (all should be 1)."""
    vectors = index.corpus.vectors
    if not len(vectors):
        return {"min": 0.0, "mean": 0.0, "max": 0.0}
    starts = range(0, len(vectors), _BLOCK_ROWS)
    norms = np.concatenate([np.linalg.norm(vectors[s : s + _BLOCK_ROWS], axis=1) for s in starts])
    return {
        "min": round(float(norms.min()), 6),
        "mean": round(float(norms.mean()), 6),
        "max": round(float(norms.max()), 6),
    }


def describe_release(store: ReleaseStore, release_id: str) -> dict[str, Any]:
    """Describe a release as ``omni release show`` prints it.

    Disk and memory per entity type, degrees, norms, golden recall, export forms.

    Raises:
        ReleaseError: It cannot be opened.
    """
    from index_builder.storage.peak_memory import private_mib

    before = private_mib()
    with store.open(release_id) as release:
        manifest = release.manifest
        loaded = private_mib() - before
        entities = {name: _describe_entity(release, name) for name in release.entities}
        return {
            "release_id": release_id,
            "active": store.current() == release_id,
            "parent": manifest.parent,
            "space_id": manifest.space_id,
            "query_upgrade": manifest.query_upgrade,
            "dimension": manifest.dimension,
            "format_version": manifest.format_version,
            "code_version": manifest.code_version,
            "deterministic": manifest.deterministic,
            "disk_bytes": manifest.total_bytes(),
            "loaded_private_mib": round(loaded, 1),
            "forms": manifest.forms,
            "entities": entities,
            "measured": {
                key: value for key, value in manifest.measured.items() if key != "entities"
            },
        }


def _describe_entity(release: Release, name: str) -> dict[str, Any]:
    manifest, index = release.manifest, release.entities[name]
    entity = manifest.entities[name]
    sizes = [
        record.size_bytes for file, record in manifest.files.items() if file.startswith(f"{name}/")
    ]
    measured = manifest.measured.get("entities", {}).get(name) or {}
    calibration = entity.calibration or {}
    texts = [text for text in release.golden(name).texts if text]
    return {
        "count": entity.count,
        "index": entity.index,
        "cpu_features": list(entity.cpu_features),
        "watermark": entity.watermark,
        "carried_from": entity.carried_from,
        "disk_bytes": sum(sizes),
        "build_peak_private_mib": measured.get("peak_private_mib"),
        "settings": calibration.get("settings"),
        "calibration_source": calibration.get("source"),
        "golden": entity.golden,
        "degrees": degree_histogram(index),
        "norms": norm_summary(index),
        "golden_texts": texts[:_SHOWN_TEXTS],
    }


def degree_histogram(index: EntityIndex) -> dict[str, Any] | None:
    """Count out-degrees of the base graph in ten bins; None where the kind shows no graph."""
    links = index.ann.neighbours()
    if links is None:
        return None
    own = np.arange(len(links), dtype=links.dtype)[:, None]
    degrees = np.count_nonzero(links != own, axis=1)
    most = int(links.shape[1])
    counts, edges = np.histogram(degrees, bins=min(10, max(1, most)), range=(0, most))
    return {
        "mean": round(float(degrees.mean()), 2),
        "max": int(degrees.max()),
        "counts": counts.tolist(),
        "edges": [round(float(e), 1) for e in edges],
    }
