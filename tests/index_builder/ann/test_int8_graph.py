"""The walk over 8-bit codes along plain and sketched links."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index_builder.ann import AnnConfig, build_index, load_index
from index_builder.errors import IndexFormatError
from index_builder.native import Engine
from tests.helpers.real_vectors import text_vectors

pytestmark = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")

N = 3_000
CONFIG = AnnConfig(m=12, ef_construction=100)


@pytest.mark.slow
@pytest.mark.parametrize(("dimension", "m"), [(7, 16), (100, 6), (256, 20)])
def test_sketched_links_lead_where_plain_links_lead(dimension: int, m: int, tmp_path: Path) -> None:
    """Degrees that are no multiple of 32 and odd widths are padded; the same graph gives the same
    neighbours, and nearly the same hits.
    """
    vectors = np.ascontiguousarray(text_vectors(N, 256)[:1_500, :dimension])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = AnnConfig(m=m, ef_construction=60, reproducible=True)
    sketched = build_index("int8-graph", vectors, config)
    unsketched = build_index("int8-graph", vectors, replace(config, sketched_links=False))
    links, plain = sketched.neighbours(), unsketched.neighbours()
    assert links is not None and plain is not None and links.shape[1] % 32 == 0
    np.testing.assert_array_equal(links[:, : plain.shape[1]], plain)
    assert (links[:, plain.shape[1] :] == np.arange(1_500)[:, None]).all()
    same = [
        len(
            np.intersect1d(
                sketched.search(v[None], 10, 80)[0], unsketched.search(v[None], 10, 80)[0]
            )
        )
        for v in vectors[:200]
    ]
    assert np.mean(same) >= 9.5


def test_load_of_links_that_do_not_fit_raises_index_format_error(tmp_path: Path) -> None:
    vectors = text_vectors(N)[:1_200]
    index = build_index("int8-graph", vectors, CONFIG)
    index.save(tmp_path / "index")
    links = np.load(tmp_path / "index.links.npy")
    for bad, message in ((links[:, :-1], "multiple of"), (links[:-1], "links of")):
        np.save(tmp_path / "index.links.npy", bad)
        with pytest.raises(IndexFormatError, match=message):
            load_index("int8-graph", tmp_path / "index", vectors, CONFIG)
    links[17, :4] = 255
    np.save(tmp_path / "index.links.npy", links)
    with pytest.raises(IndexFormatError, match="past the nodes"):
        load_index("int8-graph", tmp_path / "index", vectors, CONFIG)
