"""Hold texts tokenised once for a whole run, so that a padded batch is two numpy selections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64 = npt.NDArray[np.int64]


class TokenisedTexts:
    """Holds the token ids of many texts, ragged and flat.

    Args:
        sequences: Token ids of each text, special tokens included.
        pad_id: Id that fills the end of shorter rows.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], pad_id: int) -> None:
        self.lengths = np.fromiter(
            (len(s) for s in sequences), dtype=np.int64, count=len(sequences)
        )
        self.offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.lengths)))
        self.ids = np.fromiter(
            (i for s in sequences for i in s), dtype=np.int64, count=int(self.offsets[-1])
        )
        self.pad_id = pad_id

    def padded(self, rows: Int64) -> tuple[Tensor, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` of texts, int64 ``(len(rows), longest)``."""
        lengths = self.lengths[rows]
        columns = np.arange(int(lengths.max()))
        inside = columns[None, :] < lengths[:, None]
        places = np.where(inside, self.offsets[rows][:, None] + columns, 0)
        ids = np.where(inside, self.ids[places], self.pad_id)
        return torch.from_numpy(ids), torch.from_numpy(inside.astype(np.int64))

    def tokens_of(self, rows: Int64) -> Int64:
        """Return the token ids of texts one after another, int64 ``(sum of their lengths,)``."""
        lengths = self.lengths[rows]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens: Int64 = self.ids[np.repeat(self.offsets[rows], lengths) + within]
        return tokens

    def by_length(self, rows: Int64, chunk: int) -> list[Int64]:
        """Cut ``rows`` into chunks of similar length (ties by place), so that padding is short."""
        order = np.argsort(self.lengths[rows], kind="stable")
        return [rows[order[start : start + chunk]] for start in range(0, len(rows), chunk)]
