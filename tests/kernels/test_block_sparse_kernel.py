"""The block-sparse kernel against its reference: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.block_sparse_attention import block_sparse_attention as reference
from specattn.kernels.blocks import BlockGrid, BlockLists
from specattn.kernels.check import error_ratio
from specattn.kernels.int8_blocks import quantise_blocks, smooth_keys

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from specattn.kernels import block_sparse_launch as module
from specattn.kernels.block_sparse_launch import block_sparse_attention

NAN = float("nan")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter has no products of bfloat16.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

HEADS = [(2, 2), (3, 1), (8, 1), (12, 2)]
SHAPES = [
    (1, 1, 0),
    (37, 37, 0),
    (131, 131, 0),
    (70, 270, 200),
    (129, 193, 64),
    (5, 301, 296),
    (70, 197, None),
]


def inputs(
    query_heads: int,
    kv_heads: int,
    rows: int,
    length: int,
    head_dim: int = 64,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token-major tensors seen head-major, as the prefill methods pass them; what lies behind them is NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + length)

    def tokens(heads: int, count: int, factor: float) -> Tensor:
        whole = torch.full((batch, count + 7, heads, head_dim), NAN)
        whole[:, :count] = factor * torch.randn(batch, count, heads, head_dim, generator=generator)
        return whole.to(DEVICE, dtype)[:, :count].transpose(1, 2)

    return tokens(query_heads, rows, 2.0), tokens(kv_heads, length, 1.0), tokens(kv_heads, length, 1.0)


def faded(key: Tensor) -> Tensor:
    """Keys whose every second block of 64 is far behind the others."""
    odd = torch.arange(key.shape[2], device=DEVICE) // 64 % 2 == 1
    return torch.where(odd[:, None], 0.05 * key, key)


def random_lists(batch: int, heads: int, grid: BlockGrid, share: float = 0.6) -> BlockLists:
    generator = torch.Generator().manual_seed(grid.length)
    mask = torch.rand(batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < share
    return on_device(BlockLists.from_mask(mask, grid.query_block, grid.key_block))


def on_device(lists: BlockLists) -> BlockLists:
    return replace(lists, indices=lists.indices.to(DEVICE), counts=lists.counts.to(DEVICE))


def compare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    monkeypatch: pytest.MonkeyPatch,
    bound: float,
    **options: Any,
) -> Tensor:
    """Run both, the kernel into poisoned outputs; returns what was skipped."""
    monkeypatch.setattr(module.torch, "empty_like", poisoned_like)
    out, skipped = block_sparse_attention(query, key, value, lists, **options)
    monkeypatch.undo()
    operands = (query, key) if query.dtype == torch.int8 else (query.float(), key.float())
    expected, count = reference(*operands, value.float(), lists, **options)
    assert out.shape == query.shape and out.dtype == value.dtype
    assert error_ratio(out, expected) < bound
    assert skipped.dtype == torch.int32 and torch.equal(skipped, count)
    return skipped


def poisoned_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(tensor.shape, NAN, dtype=dtype, device=tensor.device)


@pytest.mark.parametrize("query_heads,kv_heads", HEADS)
@pytest.mark.parametrize("rows,length,start", SHAPES)
def test_lists_of_blocks(query_heads, kv_heads, rows, length, start, monkeypatch):
    tensors = inputs(query_heads, kv_heads, rows, length)
    lists = random_lists(1, query_heads, BlockGrid(rows, length, start))
    skipped = compare(*tensors, lists, monkeypatch, BOUND[torch.float32], start=start, scaling=0.2)
    assert skipped.sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_dtypes_and_channels(dtype, head_dim, monkeypatch):
    tensors = inputs(6, 2, 90, 170, head_dim, dtype=dtype)
    lists = random_lists(1, 6, BlockGrid(90, 170, 80))
    compare(*tensors, lists, monkeypatch, BOUND[dtype], start=80, scaling=head_dim**-0.5)


@pytest.mark.parametrize("query_block,key_block", [(128, 64), (64, 64), (16, 128), (128, 16)])
@pytest.mark.parametrize("start", [None, 50])
def test_block_sizes_and_batches(query_block, key_block, start, monkeypatch):
    tensors = inputs(4, 2, 150, 200, batch=2)
    lists = random_lists(2, 4, BlockGrid(150, 200, start, query_block, key_block))
    options = {"start": start, "scaling": 0.2, "row_group": query_block}
    compare(*tensors, lists, monkeypatch, BOUND[torch.float32], **options)


@pytest.mark.parametrize("rows,length,start", [(131, 131, 0), (70, 270, 200), (150, 333, None)])
@pytest.mark.parametrize("row_group", [16, 32, 128])
def test_values_of_negligible_blocks_are_skipped_and_counted(rows, length, start, row_group, monkeypatch):
    query, key, value = inputs(6, 2, rows, length)
    lists = random_lists(1, 6, BlockGrid(rows, length, start), 0.9)
    lam = torch.tensor([0.3, 1.0, 2.0, 4.0, 50.0, float("inf")], device=DEVICE)
    options = {"start": start, "scaling": 0.4, "lam": lam, "row_group": row_group}
    skipped = compare(query, faded(key), value, lists, monkeypatch, BOUND[torch.float32], **options)
    assert skipped[:, 4:].sum() == 0
    assert skipped[:, 0].sum() > 0 and skipped[:, 1].sum() > 0


def test_values_that_all_rows_skip_are_not_multiplied():
    """The second block lies 40 nats below the first in every row: not even NaN reaches the output."""
    direction = torch.ones(64, device=DEVICE) / 8
    query = direction.expand(1, 2, 128, 64).contiguous()
    key = torch.cat([20 * direction.expand(64, 64), -20 * direction.expand(64, 64)])[None, None]
    value = torch.ones_like(key)
    value[:, :, 64:] = NAN
    lists = random_lists(1, 2, BlockGrid(128, 128, None), 1.0)
    lam = torch.tensor([39.0, 41.0], device=DEVICE)
    out, skipped = block_sparse_attention(query, key, value, lists, start=None, scaling=1.0, lam=lam)
    assert error_ratio(out[:, 0], torch.ones_like(out[:, 0])) < 1e-6 and out[:, 1].isnan().all()
    assert skipped.tolist() == [[[128 * 64], [0]]]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("start", [60, None])
def test_integers_are_multiplied_with_their_scales(head_dim, start, monkeypatch):
    query, key, value = inputs(6, 2, 150, 210, head_dim, dtype=DTYPES[0])
    query, query_scales = quantise_blocks(query, 128)
    key, key_scales = quantise_blocks(faded(smooth_keys(key)), 64)
    lists = random_lists(1, 6, BlockGrid(150, 210, start))
    options = {"start": start, "scaling": 0.1, "scales": (query_scales, key_scales)}
    compare(query, key, value, lists, monkeypatch, BOUND[DTYPES[0]], **options)
    options |= {"lam": torch.linspace(1, 6, 6, device=DEVICE), "row_group": 16}
    skipped = compare(query, key, value, lists, monkeypatch, BOUND[DTYPES[0]], **options)
    assert skipped.sum() > 0


def test_what_is_in_no_list_is_not_read():
    query, key, value = inputs(4, 2, 130, 330)
    grid = BlockGrid(130, 330, 200)
    mask = torch.rand(1, 4, 2, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 1] = mask[..., 3] = False
    lists = on_device(BlockLists.from_mask(mask, grid.query_block, grid.key_block))
    for tensor in (key, value):
        tensor[:, :, 64:128] = tensor[:, :, 192:256] = NAN
    out, _ = block_sparse_attention(query, key, value, lists, start=200, scaling=0.3)
    assert torch.isfinite(out).all()


def test_empty_lists_padding_and_rows_that_see_nothing_give_zeros(monkeypatch):
    query, key, value = inputs(2, 1, 200, 200)
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    mask[:, 0, 0, 1:] = True  # rows before token 64 see nothing of it, and none sees the last
    lists = on_device(BlockLists.from_mask(mask))
    compare(query, key, value, lists, monkeypatch, BOUND[torch.float32], start=0, scaling=0.3)
    out, _ = block_sparse_attention(query, key, value, lists, start=0, scaling=0.3)
    assert (out[:, 0, :64] == 0).all() and (out[:, 1] == 0).all() and (out[:, 0, 128:] == 0).all()
    assert out[:, 0, 64:128].abs().min(-1).values.min() > 0


def test_lists_longer_than_what_is_looked_at_together(monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", 4)
    query, key, value = inputs(2, 1, 20, 300)
    lists = random_lists(1, 2, BlockGrid(20, 300, 280, 32, 16), 0.9)
    out, _ = block_sparse_attention(query, key, value, lists, start=280, scaling=0.2)
    expected, _ = reference(query, key, value, lists, start=280, scaling=0.2)
    assert lists.counts.min() > 8
    assert error_ratio(out, expected) < BOUND[torch.float32]


def test_what_does_not_fit_is_refused():
    query, key, value = inputs(4, 2, 70, 70)
    lists = random_lists(1, 4, BlockGrid(70, 70, 0))

    def run(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, **options: Any) -> None:
        block_sparse_attention(query, key, value, lists, start=0, scaling=1.0, **options)

    refusals: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("query_block=48 is no power of two", (query, key, value, replace(lists, query_block=48)), {}),
        ("key_block=256 is no power of two", (query, key, value, replace(lists, key_block=256)), {}),
        ("512 channels", (*(part.repeat(1, 1, 1, 8) for part in (query, key, value)), lists), {}),
        ("float64", (query.double(), key.double(), value.double(), lists), {}),
        ("counts has shape", (query, key, value, random_lists(1, 4, BlockGrid(200, 70, 0))), {}),
        ("4 query heads are no multiple of 3", (query, key[:, [0, 0, 1]], value[:, [0, 0, 1]], lists), {}),
        ("scales belong to integers", (query.char(), key.char(), value, lists), {}),
        ("row_group=48 does not divide", (query, key, value, lists), {"row_group": 48}),
        ("must be contiguous", (query, key, value.mT.contiguous().mT, lists), {}),
    ]
    for message, arguments, options in refusals:
        with pytest.raises(UsageError, match=message):
            run(*arguments, **options)
