"""The product that gives queries, keys and values where they belong: the kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specattn.kernels import norm_linear
from specattn.kernels.check import error_ratio
from specattn.kernels.normed_rows import NormedRows
from specattn.kernels.product_tiling import ProductTiling

kernel = pytest.importorskip("specattn.kernels.norm_rope_linear_triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUERY_HEADS, KV_HEADS, HEAD_DIM, POOL = 3, 2, 32, 80


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("rows", [1, 17, 48])
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize("columns,depth,described", [(16, 32, False), (16, 32, True), (64, 64, True)])
def test_queries_are_returned_and_keys_and_values_stored(rows, channels, columns, depth, described):
    outputs = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
    normed = NormedRows(randn(rows, channels), 1 + randn(5, rows, seed=1).square(), 1e-6)
    product = normed, randn(outputs, channels, seed=2), randn(outputs, seed=3)
    angles = randn(POOL, HEAD_DIM, seed=4)
    places = (
        torch.randperm(POOL, generator=torch.Generator().manual_seed(5))[:rows].to(DEVICE) for _ in "pr"
    )
    new = (angles.cos(), angles.sin(), *places)

    def run(operation, **options):
        pool = [torch.full((POOL, KV_HEADS, HEAD_DIM), torch.nan, device=DEVICE) for _ in range(2)]
        query = operation(*product, *new, *pool, **options)
        assert all(part.isnan().sum() == (POOL - rows) * KV_HEADS * HEAD_DIM for part in pool)
        return [query, *(part[new[3]] for part in pool)]

    tiling = ProductTiling(columns, depth, described=described)
    found = run(kernel.norm_rope_linear, tiling=tiling)
    for got, wanted in zip(found, run(norm_linear.norm_rope_linear), strict=True):
        assert got.shape == wanted.shape and error_ratio(got, wanted) < 1e-6
