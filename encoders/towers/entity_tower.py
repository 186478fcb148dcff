"""The entity tower: one unit vector per pin, product or ad.

It reads hash embeddings of n-grams per field and continuous features, through an MLP.

Paper section 4.2, formulas in `EntityEncoder`. Letters: N entities, F text fields, T tokens, C
continuous features, H hashes, D dimension.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders.errors import BundleError, ConfigError
from encoders.towers.entity_features import EntityBatch, EntityFeaturizer
from encoders.towers.hash_embedding import HASHES, hash_rows, sum_bags

TOWER_FORMAT = 1
RESIDUAL_START = 0.03
"""Initial scale of the MLP's last weights where there is a residual, which then dominates."""


@dataclass(frozen=True, kw_only=True)
class EntityTowerConfig:
    """Shape of an entity tower; saved beside its weights as ``config.json``."""

    vocabulary_size: int
    """Token ids, ``len(featurizer.vocabulary)``."""
    fields: int
    """Text fields F."""
    continuous_width: int = 0
    """Continuous features C, 0 for none."""
    table_rows: int = 100_000
    """Rows of the shared hash embedding table (paper: 100,000)."""
    token_dimension: int = 256
    """Width of a token vector."""
    hidden: tuple[int, ...] = (1024, 1024)
    """Widths of the hidden layers."""
    dimension: int = 256
    """Width of the entity vector D."""
    residual_width: int = 0
    """Number of the last continuous features that are added to the MLP's output: 0 or D.

    An entity then starts at its text embedding.
    """
    dropout: float = 0.0
    """Share of the last hidden layer dropped in training."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("vocabulary_size", "fields", "table_rows", "token_dimension", "dimension"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"EntityTowerConfig.{name} ({getattr(self, name)}) must be at least 1"
                )
        if (
            self.residual_width not in (0, self.dimension)
            or self.residual_width > self.continuous_width
        ):
            raise ConfigError(
                f"EntityTowerConfig.residual_width ({self.residual_width}) must be 0 or the"
                f" dimension ({self.dimension}), and no more than continuous_width"
                f" ({self.continuous_width})"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"EntityTowerConfig.dropout ({self.dropout}) must lie in [0, 1)")
        if self.continuous_width < 0 or any(width < 1 for width in self.hidden):
            raise ConfigError(
                f"EntityTowerConfig: continuous_width ({self.continuous_width}) or hidden"
                f" ({self.hidden}) is negative or zero"
            )

    @classmethod
    def for_featurizer(cls, featurizer: EntityFeaturizer, **settings: Any) -> EntityTowerConfig:
        """Make the configuration whose inputs are what this featuriser makes.

        ``settings`` are the other fields.
        """
        return cls(
            vocabulary_size=len(featurizer.vocabulary),
            fields=len(featurizer.config.text_fields),
            continuous_width=featurizer.config.continuous_width,
            residual_width=featurizer.config.text_embedding_width,
            **settings,
        )


class _WithResidual(nn.Sequential):
    """The MLP, plus the last inputs as they are."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__(*layers)
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, inputs) -> (N, D)."""
        output: Tensor = super().forward(inputs)
        return output + inputs[:, -self.width :]


class EntityEncoder(nn.Module):
    """Entity tower.

    ``token(i) = w[i, 0] * E[h0(i)] + w[i, 1] * E[h1(i)]``, with the signed weights ``w`` learned
    per token id; ``field(f) = LayerNorm(sum of the field's tokens)`` with a scale of its own per
    field; an empty field adds nothing; ``entity = normalise(MLP(concat(sum of fields,
    continuous)))``, each hidden layer Linear, ReLU, LayerNorm.

    Attributes:
        config: Shape.
        featurizer: Makes this tower's inputs; saved and loaded with it. None for a tower used on
            ready batches only.
    """

    def __init__(
        self, config: EntityTowerConfig, featurizer: EntityFeaturizer | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.featurizer = featurizer
        self.table = nn.Parameter(torch.empty(config.table_rows, config.token_dimension))
        self.token_weights = nn.Parameter(torch.empty(config.vocabulary_size, HASHES))
        self.field_scale = nn.Parameter(torch.ones(config.fields, config.token_dimension))
        self.field_bias = nn.Parameter(torch.zeros(config.token_dimension))
        layers: list[nn.Module] = []
        width = config.token_dimension + config.continuous_width
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.LayerNorm(hidden)]
            width = hidden
        last = nn.Linear(width, config.dimension)
        layers += [nn.Dropout(config.dropout), last] if config.dropout else [last]
        self.mlp = (
            _WithResidual(layers, config.residual_width)
            if config.residual_width
            else nn.Sequential(*layers)
        )
        self.rows: Tensor
        rows = torch.from_numpy(hash_rows(config.vocabulary_size, config.table_rows))
        self.register_buffer("rows", rows, persistent=False)  # (V, H) int32
        nn.init.normal_(self.table, std=config.token_dimension**-0.5)
        nn.init.normal_(self.token_weights)
        if config.residual_width:  # start close to the text embedding
            with torch.no_grad():
                last.weight.mul_(RESIDUAL_START)
                last.bias.zero_()

    def forward(self, features: EntityBatch) -> Tensor:
        """Embed entities.

        Args:
            features: N entities; on the same device as the weights.

        Returns:
            (N, D) rows of unit length, in the dtype of the computation.
        """
        return functional.normalize(self.mlp(self._inputs(features)), dim=-1)

    def _inputs(self, features: EntityBatch) -> Tensor:
        """Compute the MLP's inputs, (N, token_dimension + C)."""
        ids = features.token_ids
        rows = self.rows[ids].reshape(-1)  # (T * H,)
        weights = functional.embedding(ids, self.token_weights).reshape(-1)  # (T * H,)
        offsets = (features.offsets * HASHES).to(rows.dtype)  # (N * F + 1,)
        if rows.is_cuda:
            bags = sum_bags(self.table, rows, weights, offsets)  # (N * F, token_dimension)
            sums = bags.view(len(features), features.fields, -1)
            normed = functional.layer_norm(sums, sums.shape[-1:])
            text = torch.einsum("nfd,fd->nd", normed, self.field_scale)
        else:
            # Most fields of most entities are empty, and an empty field adds nothing: only the P
            # bags that hold tokens are summed.
            present = torch.nonzero(offsets.diff()).squeeze(1)  # (P,)
            starts = torch.cat((offsets[present], offsets[-1:]))
            sums = sum_bags(self.table, rows, weights, starts)  # (P, token_dimension)
            normed = functional.layer_norm(sums, sums.shape[-1:])
            scaled = normed * self.field_scale[present % features.fields]
            text = scaled.new_zeros(len(features), scaled.shape[1])
            text = text.index_add(0, present // features.fields, scaled)
        text = text + self.field_bias
        if features.continuous is not None:
            return torch.cat((text, features.continuous.to(text.dtype)), dim=-1)
        return text

    @torch.no_grad()
    def encode(self, catalogue: pl.DataFrame, batch_size: int = 1024) -> npt.NDArray[np.float32]:
        """Embed catalogue rows: featurise and run the tower in evaluation mode on its device.

        Args:
            catalogue: N rows with the featuriser's columns.
            batch_size: Entities per pass.

        Returns:
            (N, D) float32, unit rows, in the order of the rows.

        Raises:
            ConfigError: The tower has no featuriser.
        """
        if self.featurizer is None:
            raise ConfigError(
                "this entity tower was made without a featuriser; pass one to EntityEncoder, or"
                " call it on an EntityBatch"
            )
        return self.encode_batch(self.featurizer(catalogue), batch_size)

    @torch.no_grad()
    def encode_batch(
        self, features: EntityBatch, batch_size: int = 1024
    ) -> npt.NDArray[np.float32]:
        """Embed ready features; (N, D) float32 unit rows. See ``encode``."""
        was_training = self.training
        self.eval()
        vectors = np.empty((len(features), self.config.dimension), dtype=np.float32)
        for start in range(0, len(features), batch_size):
            part = features.slice(start, min(start + batch_size, len(features)))
            output = self(part.to(self.table.device)).float()
            vectors[start : start + batch_size] = functional.normalize(output, dim=-1).cpu().numpy()
        self.train(was_training)
        return vectors

    def for_inference(self, dtype: torch.dtype = torch.float32) -> InferenceTower:
        """Arrange this tower's weights for inference on their device; see ``InferenceTower``."""
        return InferenceTower(self, dtype)

    def save(self, folder: Path) -> None:
        """Write ``model.safetensors`` (fp32), ``config.json`` and the featuriser's files."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.detach().float().cpu().contiguous()
            for name, value in self.state_dict().items()
        }
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        described = {"format_version": TOWER_FORMAT, **asdict(self.config)}
        (folder / "config.json").write_text(
            json.dumps(described, indent=2) + "\n", encoding="utf-8"
        )
        if self.featurizer is not None:
            self.featurizer.save(folder)

    @classmethod
    def load(cls, folder: Path) -> EntityEncoder:
        """Read what ``save`` wrote; on the CPU, in evaluation mode.

        Raises:
            BundleError: A file is missing, damaged, of another format version, or the weights do
                not fit the configuration.
        """
        try:
            described: dict[str, Any] = json.loads(
                (folder / "config.json").read_text(encoding="utf-8")
            )
            version = described.pop("format_version", None)
            weights = safetensors.torch.load_file(folder / "model.safetensors")
        except (OSError, ValueError, AttributeError, safetensors.SafetensorError) as error:
            raise BundleError(
                f"{folder}: no readable entity tower ({error}); copy the whole entity_encoder"
                " folder again"
            ) from error
        if version != TOWER_FORMAT:
            raise BundleError(
                f"{folder}: entity tower format {version!r}, but this code reads {TOWER_FORMAT};"
                " use the release that wrote it"
            )
        featurizer = EntityFeaturizer.load(folder) if (folder / "features.json").exists() else None
        try:
            encoder = cls(EntityTowerConfig(**described), featurizer)
            encoder.load_state_dict(weights)
        except (RuntimeError, TypeError, ConfigError) as error:
            raise BundleError(
                f"{folder}: weights and config.json do not belong together ({error})"
            ) from error
        if featurizer is not None and len(featurizer.vocabulary) != encoder.config.vocabulary_size:
            raise BundleError(
                f"{folder}: the tower expects {encoder.config.vocabulary_size} token ids, but the"
                f" vocabulary has {len(featurizer.vocabulary)}; copy the whole entity_encoder"
                " folder again"
            )
        return encoder.eval()


class InferenceTower:
    """An entity tower's forward pass with its MLP in another precision.

    Sums over n-grams and the final normalisation stay in float32.

    Args:
        encoder: The tower; its table and token weights are shared, not copied.
        dtype: float32, or bfloat16 (cosine to float32 at least 0.999).
    """

    def __init__(self, encoder: EntityEncoder, dtype: torch.dtype) -> None:
        self._encoder = encoder
        self._dtype = dtype
        self._mlp = encoder.mlp if dtype == torch.float32 else copy.deepcopy(encoder.mlp).to(dtype)

    @torch.inference_mode()
    def __call__(self, features: EntityBatch) -> Tensor:
        """Embed N entities; (N, D) float32 unit rows on the tower's device."""
        output = self._mlp(self._encoder._inputs(features).to(self._dtype))
        return functional.normalize(output.float(), dim=-1)


def create_entity_encoder(featurizer: EntityFeaturizer, **settings: Any) -> EntityEncoder:
    """Create an entity tower on this featuriser.

    ``settings`` are fields of ``EntityTowerConfig`` (``table_rows``, ``hidden``, ...).
    """
    return EntityEncoder(EntityTowerConfig.for_featurizer(featurizer, **settings), featurizer)
