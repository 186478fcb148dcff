"""Make a query tower that starts from the Universal Sentence Encoder.

It is the one to train when recall counts more than 16 MB and 5 ms.

python -m encoders.pretraining.use_query_tower --out use_tower
omni train encoders/recipes/sample_use.toml --out runs/use    # reads the folder use_tower
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from encoders.commands.console import handle_errors, say, stage
from encoders.datasets.dataset import load_sample
from encoders.pretraining.devanagari import add_devanagari
from encoders.towers.query_tower import QueryEncoder
from encoders.towers.universal_sentence_encoder import load_universal_sentence_encoder

PRINCIPAL_TEXTS = 20_000
"""Train queries that decide the 256 principal directions."""


def create_query_tower(texts: Sequence[str], dimension: int = 256) -> QueryEncoder:
    """Make a query tower of the encoder and its first principal directions over ``texts``."""
    model, tokenizer = load_universal_sentence_encoder()
    tower = QueryEncoder(model, tokenizer, dimension=model.config.hidden_size).eval()
    with torch.no_grad():
        tower.projection.weight.copy_(torch.eye(model.config.hidden_size))
    vectors = tower.encode(texts)
    _, directions = np.linalg.eigh(vectors.T.astype(np.float64) @ vectors)
    directions = directions[:, ::-1][:, :dimension]  # the largest eigenvalues first
    turned = QueryEncoder(model, tokenizer, dimension)
    with torch.no_grad():
        turned.projection.weight.copy_(torch.from_numpy(directions.T.copy()))
    return turned.eval()


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the saved query tower."
)
@handle_errors
def command(out: Path) -> None:
    """Save a query tower that starts from the Universal Sentence Encoder.

    Name its folder as `query_encoder = "FOLDER"` in a training config.

    Example: python -m encoders.pretraining.use_query_tower --out use_tower
    """
    pairs = load_sample(images=False).split("train")
    texts = pairs["query"].unique(maintain_order=True)
    with stage(f"turn {min(PRINCIPAL_TEXTS, len(texts)):,} queries to their principal directions"):
        tower = create_query_tower(texts.sample(min(PRINCIPAL_TEXTS, len(texts)), seed=1).to_list())
    with stage("add Devanagari"):
        by_entity = pairs.group_by("entity_id", maintain_order=True).agg("query")
        tower = add_devanagari(tower, dict(by_entity.iter_rows()))
    tower.save(out)
    say(f'{out}: saved; use it with query_encoder = "{out}"')


if __name__ == "__main__":
    command()
