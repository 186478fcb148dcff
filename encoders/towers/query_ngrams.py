"""The part of a query tower that reads words and character n-grams from a hashed table.

It is the paper's hash embedding on the query side (its entity tower has it, section 4.2): rare
names and scripts that a small transformer's vocabulary cuts into pieces keep vectors of their own.
The sum is added to the transformer's vector before L2 normalisation, so that one inner product
stays one inner product. Letters: B queries, G buckets of the longest, D dimension.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders.errors import BundleError
from encoders.text.ngrams import TEXT_RULES
from encoders.text.query_ngrams import Int32, Int64, ngram_buckets, padded
from encoders.towers.forms import NGRAM_SETTINGS

_WEIGHTS = "ngrams.safetensors"


class QueryNgrams(nn.Module):
    """``sum of table[bucket] / sqrt(sum of weight[bucket] ** 2)`` over a query's distinct buckets.

    Args:
        buckets: Rows of the table, a power of two; one row of zeros follows, for padding.
        dimension: D.
    """

    def __init__(self, buckets: int, dimension: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.table = nn.Parameter(torch.zeros(buckets + 1, dimension))
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(buckets + 1))  # inverse document frequencies

    def forward(self, ids: Tensor) -> Tensor:
        """Sum the rows of buckets ``(B, G)``, filled up with ``buckets``: ``(B, D)``."""
        square = self.weights[ids].square().sum(1, keepdim=True)  # (B, 1)
        return nn.functional.embedding(ids, self.table).sum(1) / square.clamp_min(1e-6).sqrt()

    def read(self, texts: Sequence[str]) -> tuple[Int32, Int64]:
        """Find the buckets of texts: flat ids and offsets, as ``ngram_buckets``."""
        return ngram_buckets(texts, self.buckets)

    def pad(self, ids: Int32, offsets: Int64, rows: Int64 | Sequence[int]) -> Tensor:
        """Put the buckets of some texts into one rectangle, int64 ``(B, G)``."""
        return torch.from_numpy(padded(ids, offsets, rows, self.buckets))

    def turned(self, matrix: Tensor) -> QueryNgrams:
        """Copy with every row multiplied by a matrix ``(to, D)``."""
        made = QueryNgrams(self.buckets, int(matrix.shape[0]))
        with torch.no_grad():
            made.table.copy_((self.table.double() @ matrix.double().T).float())
            made.weights.copy_(self.weights)
        return made

    def save(self, folder: Path) -> None:
        """Write the settings and, in half precision, the weights."""
        described = {"format_version": 1, "buckets": self.buckets, "text_rules": TEXT_RULES}
        (folder / NGRAM_SETTINGS).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        state = {
            name: v.detach().half().cpu().contiguous() for name, v in self.state_dict().items()
        }
        save_file(state, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> QueryNgrams | None:
        """Read what ``save`` wrote; None where there is none.

        Raises:
            BundleError: The files are damaged, or of other rules.
        """
        if not (folder / NGRAM_SETTINGS).is_file():
            return None
        try:
            described = json.loads((folder / NGRAM_SETTINGS).read_text(encoding="utf-8"))
            weights = load_file(folder / _WEIGHTS)
            made = cls(int(described["buckets"]), int(weights["table"].shape[1]))
            made.load_state_dict({name: value.float() for name, value in weights.items()})
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise BundleError(
                f"{folder}: the query tower's n-grams cannot be read ({error}). Copy the bundle"
                " again."
            ) from error
        if described.get("text_rules") != TEXT_RULES:
            raise BundleError(
                f"{folder}: n-grams by text rules {described.get('text_rules')!r}, but this code"
                f" reads by {TEXT_RULES}. Train again."
            )
        return made
