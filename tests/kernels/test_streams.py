"""The fused stream of few rows against the separate one: by references, and by kernels through several layers."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from specattn.fast.layer import FastLayer
from specattn.fast.operations import references
from specattn.fast.stream import FusedStream, NewTokens, SeparateStream, Stream
from specattn.kernels.check import error_ratio
from specattn.kernels.product_tiling import ProductWorkspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, HEADS, WIDTH, EPS = 72, 3 * 32, 200, 1e-6
KV_HEADS, HEAD_DIM, POOL = 1, 32, 50
KERNELS = pytest.param(
    "kernels",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("triton") is None
        or not (DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"),
        reason="no triton, or nothing that runs it",
    ),
)


def layer(seed: int, has_bias: bool, has_norms: bool) -> FastLayer:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE)

    return FastLayer(
        input_norm=1 + randn(HIDDEN),
        qkv=randn(HEADS + 2 * KV_HEADS * HEAD_DIM, HIDDEN),
        qkv_bias=randn(HEADS + 2 * KV_HEADS * HEAD_DIM) if has_bias else None,
        out=randn(HIDDEN, HEADS),
        out_bias=randn(HIDDEN) if has_bias else None,
        post_norm=1 + randn(HIDDEN),
        gate_up=randn(2 * WIDTH, HIDDEN),
        down=randn(HIDDEN, WIDTH),
        next_norm=1 + randn(HIDDEN),
        head_norms=(1 + randn(HEAD_DIM), 1 + randn(HEAD_DIM), EPS) if has_norms else None,
    )


@pytest.mark.parametrize("source", ["references", KERNELS])
@pytest.mark.parametrize(
    "rows,has_bias,has_norms", [(1, False, False), (20, True, False), (48, True, False), (5, False, True)]
)
def test_fused_and_separate_streams_agree(source: str, rows: int, has_bias: bool, has_norms: bool) -> None:
    second = layer(1, has_bias, has_norms)
    first = replace(layer(0, has_bias, has_norms), next_norm=second.input_norm)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(rows, HIDDEN, generator=generator).to(DEVICE)
    angles = torch.randn(POOL, HEAD_DIM, generator=generator)
    places = (torch.randperm(POOL, generator=generator)[:rows].to(DEVICE) for _ in range(2))
    new = NewTokens(angles.cos().to(DEVICE), angles.sin().to(DEVICE), *places)
    operations = references()
    if source == "kernels":
        from specattn.fast.operations import kernels

        operations = kernels()

    def through(stream: Stream) -> list[torch.Tensor]:
        seen = []
        for one in (first, second):
            pool = [torch.full((POOL, KV_HEADS, HEAD_DIM), torch.nan, device=DEVICE) for _ in range(2)]
            query = stream.query(one, new, *pool, None)
            assert all(part.isnan().sum() == (POOL - rows) * KV_HEADS * HEAD_DIM for part in pool)
            seen += [query, *(part[new.rows] for part in pool)]
            stream.absorb(query.flatten(1), one)
        return [*seen, stream.normed(second.next_norm)]

    separate = through(SeparateStream(start, references(), EPS))
    fused = through(FusedStream(start, operations, EPS, first, ProductWorkspace.allocate(DEVICE)))
    for got, wanted in zip(fused, separate, strict=True):
        assert error_ratio(got, wanted) < 1e-6
