"""Search exactly by inner product, in blocks: the reference for every index and every metric.

torch takes the products; it is imported at the first search, so that a server, which only reads
what was measured with it, needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from encoders.errors import ConfigError, InvalidVectors

if TYPE_CHECKING:
    import torch

SCORES_AT_ONCE = 1 << 24
"""Most scores held at once (64 MiB of float32): a chunk of queries times a block of corpus rows."""


def exact_top_k(
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int,
    *,
    block_rows: int = 65536,
    mask: np.ndarray | None = None,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``k`` corpus rows with the highest inner product for each query.

    The corpus is read in blocks, so it may be a memory map larger than memory, and may live on
    another device than the result.

    Args:
        queries: ``(B, D)`` float32. ``B`` may be 0.
        corpus: ``(N, D)`` float32. ``N`` may be 0.
        k: Results per query, at least 1.
        block_rows: Corpus rows scored at once.
        mask: bool ``(N,)`` or ``(B, N)``; only rows that are True may be returned.
        device: Where products are taken, e.g. ``cuda``; always in float32.

    Returns:
        ``rows`` int64 ``(B, k)`` and ``scores`` float32 ``(B, k)``, best first, equal scores by
        ascending row. Where fewer than ``k`` rows may be returned the tail holds row -1 with score
        -inf.

    Raises:
        InvalidVectors: Shapes do not fit each other.
        ConfigError: ``k`` or ``block_rows`` is below 1.
    """
    if k < 1 or block_rows < 1:
        raise ConfigError(
            f"k and block_rows must be at least 1, but got k={k}, block_rows={block_rows}."
        )
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise InvalidVectors(
            f"expected queries (B, D) and corpus (N, D) with one D, got {queries.shape} and"
            f" {corpus.shape}. Were both made by one bundle?"
        )
    import torch

    if mask is not None and mask.shape not in ((len(corpus),), (len(queries), len(corpus))):
        raise InvalidVectors(
            f"expected a mask of shape ({len(corpus)},) or ({len(queries)}, {len(corpus)}), but got"
            f" {mask.shape}."
        )
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    chunk = max(1, SCORES_AT_ONCE // max(1, min(block_rows, len(corpus))))
    for corpus_start in range(0, len(corpus), block_rows):
        block = _tensor(corpus[corpus_start : corpus_start + block_rows], device)
        for start in range(0, len(queries), chunk):
            part = slice(start, start + chunk)
            products = _tensor(queries[part], device) @ block.T  # (b, D) @ (D, n) -> (b, n)
            if mask is not None:
                allowed = mask if mask.ndim == 1 else mask[part]
                allowed = allowed[..., corpus_start : corpus_start + block_rows]
                products.masked_fill_(
                    ~torch.from_numpy(np.array(allowed, dtype=bool)).to(device), -torch.inf
                )
            block_rows_found, block_scores = top_k_of_scores(products, k)
            block_rows_found[block_rows_found >= 0] += corpus_start
            rows[part], scores[part] = _merge(
                (rows[part], scores[part]), (block_rows_found, block_scores), k
            )
    return rows, scores


def top_k_of_scores(scores: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the ``k`` highest scores of each row, best first, equal scores by ascending column.

    Args:
        scores: ``(b, n)`` float32; -inf marks a column that may not be returned.
        k: At least 1; may exceed ``n``.

    Returns:
        Columns int64 and scores float32, ``(b, min(k, n))``; -1 and -inf where a row runs out.
    """
    import torch

    width = min(k, scores.shape[1])
    values, columns = torch.topk(scores, min(width + 1, scores.shape[1]), dim=1)
    if width < scores.shape[1]:
        # topk may pick any of several columns that tie for the last place: only then is the row
        # sorted in full.
        tied = torch.nonzero(values[:, width] == values[:, width - 1]).flatten()
        values, columns = values[:, :width].contiguous(), columns[:, :width].contiguous()
        for row in tied.tolist():
            order = torch.sort(scores[row], descending=True, stable=True).indices[:width]
            columns[row], values[row] = order, scores[row, order]
    found = columns.cpu().numpy()
    best = values.cpu().numpy()
    by_score = np.lexsort((found, -best), axis=1)
    found = np.take_along_axis(found, by_score, axis=1)
    best = np.take_along_axis(best, by_score, axis=1)
    found[np.isneginf(best)] = -1
    return found, best


def count_above(scores: torch.Tensor, limit: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Count the columns that rank before a given one: a higher score, or as high and further left.

    Args:
        scores: ``(b, n)`` float32.
        limit: ``(b,)`` float32: the score to compare with; ``scores`` at ``column`` may be another.
        column: ``(b,)`` int64: the place that ties are broken by.

    Returns:
        int64 ``(b,)``: 0 where nothing ranks before it.
    """
    import torch

    columns = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int32)
    limit, column = limit[:, None], column[:, None].int()
    return ((scores > limit) | ((scores == limit) & (columns < column))).sum(dim=1)


def _tensor(values: np.ndarray, device: str) -> torch.Tensor:
    import torch

    array = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _merge(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two lists of rows and scores per query into the ``k`` best of both."""
    rows = np.concatenate((first[0], second[0]), axis=1)
    scores = np.concatenate((first[1], second[1]), axis=1)
    last = np.where(rows < 0, np.iinfo(np.int64).max, rows)
    order = np.lexsort((last, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
