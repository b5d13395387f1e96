"""Block-sparse attention against an online softmax, row by row in float64, on odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specattn.kernels.block_sparse_attention import block_sparse_attention
from specattn.kernels.blocks import BlockGrid, BlockLists, in_blocks
from specattn.kernels.check import error_ratio
from specattn.kernels.int8_blocks import quantise_blocks, smooth_keys

HEADS = [(2, 2), (3, 1), (6, 1), (8, 1), (12, 2)]
SHAPES = [(1, 1, 0), (37, 37, 0), (128, 128, 0), (131, 131, 0), (70, 270, 200), (129, 193, 64), (5, 301, 296)]


def inputs(query_heads: int, kv_heads: int, rows: int, length: int, head_dim: int = 16, batch: int = 1):
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    query = 3 * torch.randn(batch, query_heads, rows, head_dim, generator=generator)
    key = torch.randn(batch, kv_heads, length, head_dim, generator=generator)
    value = torch.randn(batch, kv_heads, length, head_dim, generator=generator)
    return query, key, value


def random_mask(batch: int, heads: int, grid: BlockGrid, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(grid.length)
    mask = torch.rand(batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < share
    visible = torch.arange(grid.key_blocks) < grid.visible(torch.device("cpu"))[:, None]
    return (mask | grid.diagonal(torch.device("cpu"))) & visible


def online(query, key, value, mask, start, scaling, sizes=(128, 64), lam=None, row_group=32):
    """One row, one key block at a time, as algorithm 1 of the paper reads; ``mask`` says which blocks."""
    batch, heads, rows, _ = query.shape
    length, group = key.shape[2], heads // key.shape[1]
    out = torch.full((batch, heads, rows, value.shape[-1]), float("nan"), dtype=torch.float64)
    skipped = torch.zeros(mask.shape[:3], dtype=torch.int32)
    for b, h, i in itertools.product(*map(range, mask.shape[:3])):
        end = min((i + 1) * sizes[0], rows)
        for first in range(i * sizes[0], end, row_group):
            members = range(first, min(first + row_group, end))
            largest = dict.fromkeys(members, -float("inf"))
            total = dict.fromkeys(members, 0.0)
            summed = {row: torch.zeros(value.shape[-1], dtype=torch.float64) for row in members}
            for j in mask[b, h, i].nonzero().flatten().tolist():
                gaps, weights = [], {}
                for row in members:
                    stop = min((j + 1) * sizes[1], length if start is None else start + row + 1)
                    tokens = slice(j * sizes[1], max(stop, j * sizes[1]))
                    logits = key[b, h // group, tokens].double() @ query[b, h, row].double() * scaling
                    if not len(logits):
                        continue
                    local = float(logits.max())
                    new = max(largest[row], local)
                    shrink = torch.tensor(largest[row] - new, dtype=torch.float64).exp()
                    weights[row] = (logits - new).exp(), value[b, h // group, tokens].double()
                    total[row] = total[row] * shrink + weights[row][0].sum()
                    summed[row] *= shrink
                    largest[row] = new
                    gaps.append(local - new)
                needed = lam is None or (gaps and max(gaps) >= -float(lam[h]))
                for row, (weight, values) in weights.items():
                    if needed:
                        summed[row] += weight @ values
                    else:
                        skipped[b, h, i] += len(weight)
            for row in members:
                out[b, h, row] = summed[row] / total[row] if total[row] else 0.0
    return out, skipped


@pytest.mark.parametrize("query_heads,kv_heads", HEADS)
@pytest.mark.parametrize("rows,length,start", SHAPES)
def test_lists_of_blocks(query_heads, kv_heads, rows, length, start):
    query, key, value = inputs(query_heads, kv_heads, rows, length)
    mask = random_mask(1, query_heads, BlockGrid(rows, length, start))
    out, skipped = block_sparse_attention(
        query, key, value, BlockLists.from_mask(mask), start=start, scaling=0.3
    )
    expected, _ = online(query, key, value, mask, start, 0.3)
    assert out.shape == query.shape and out.dtype == value.dtype
    assert error_ratio(out, expected) < 1e-5
    assert skipped.shape == mask.shape[:3] and skipped.sum() == 0


@pytest.mark.parametrize("query_block,key_block", [(128, 64), (64, 64), (32, 128)])
@pytest.mark.parametrize("start", [None, 50])
def test_other_block_sizes_batches_and_rows_that_see_everything(query_block, key_block, start):
    query, key, value = inputs(4, 2, 150, 200, batch=2)
    grid = BlockGrid(150, 200, start, query_block, key_block)
    mask = random_mask(2, 4, grid)
    lists = BlockLists.from_mask(mask, query_block, key_block)
    out, _ = block_sparse_attention(query, key, value, lists, start=start, scaling=0.2)
    expected, _ = online(query, key, value, mask, start, 0.2, (query_block, key_block))
    assert error_ratio(out, expected) < 1e-5


@pytest.mark.parametrize("rows,length,start", [(131, 131, 0), (70, 270, 200)])
@pytest.mark.parametrize("row_group", [16, 32, 128])
def test_values_of_negligible_blocks_are_skipped_and_counted(rows, length, start, row_group):
    query, key, value = inputs(6, 2, rows, length)
    mask = random_mask(1, 6, BlockGrid(rows, length, start), 0.9)
    lam = torch.tensor([0.3, 1.0, 2.0, 4.0, 50.0, float("inf")])
    out, skipped = block_sparse_attention(
        query, key, value, BlockLists.from_mask(mask), start=start, scaling=1.0, lam=lam, row_group=row_group
    )
    expected, count = online(query, key, value, mask, start, 1.0, lam=lam, row_group=row_group)
    assert error_ratio(out, expected) < 1e-5
    assert torch.equal(skipped, count)
    assert skipped[:, 4:].sum() == 0
    if row_group == 16:
        assert skipped[:, 0].sum() > 0 and skipped[:, 1].sum() > 0


def test_a_smaller_lam_skips_more():
    query, key, value = inputs(4, 1, 300, 300)
    lists = BlockLists.from_mask(random_mask(1, 4, BlockGrid(300, 300, 0), 1.0))
    lam = torch.tensor([1.0, 2.0, 3.0, 6.0])
    query = query[:, :1].expand(-1, 4, -1, -1)
    _, skipped = block_sparse_attention(query, key, value, lists, start=0, scaling=1.0, lam=lam, row_group=16)
    counts = skipped.sum((0, 2)).tolist()
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_what_is_in_no_list_is_not_read():
    query, key, value = inputs(4, 2, 130, 330)
    mask = random_mask(1, 4, BlockGrid(130, 330, 200))
    mask[..., 1] = mask[..., 3] = False
    lists = BlockLists.from_mask(mask)
    expected, _ = block_sparse_attention(query, key, value, lists, start=200, scaling=0.3)
    for tensor in (key, value):
        tensor[:, :, 64:128] = tensor[:, :, 192:256] = float("nan")
    out, _ = block_sparse_attention(query, key, value, lists, start=200, scaling=0.3)
    assert torch.equal(out, expected)


def test_padding_of_the_lists_is_not_read():
    query, key, value = inputs(2, 1, 64, 256)
    key[:, :, :64] = value[:, :, :64] = float("nan")  # where an index of -1 would lead
    indices = torch.tensor([2, 3, -1, -1], dtype=torch.int32).expand(1, 2, 1, 4)
    lists = BlockLists(indices, torch.full((1, 2, 1), 2, dtype=torch.int32))
    out, _ = block_sparse_attention(query, key, value, lists, start=192, scaling=0.3)
    assert torch.isfinite(out).all()


def test_query_blocks_without_a_list_and_rows_that_see_nothing_are_zero():
    query, key, value = inputs(2, 1, 200, 200)
    mask = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    mask[:, 0, 0, 1] = True  # rows before token 64 see nothing of it
    out, _ = block_sparse_attention(query, key, value, BlockLists.from_mask(mask), start=0, scaling=0.3)
    expected, _ = online(query, key, value, mask, 0, 0.3)
    assert (out[:, 0, :64] == 0).all() and (out[:, 1] == 0).all() and (out[:, 0, 128:] == 0).all()
    assert out[:, 0, 64:128].abs().min(-1).values.min() > 0
    assert error_ratio(out, expected) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_integers_are_multiplied_with_their_scales(head_dim):
    query, key, value = inputs(6, 2, 150, 210, head_dim)
    query_int, query_scales = quantise_blocks(query, 128)
    key_int, key_scales = quantise_blocks(key, 64)
    lists = BlockLists.from_mask(random_mask(1, 6, BlockGrid(150, 210, 60)))
    out, _ = block_sparse_attention(
        query_int, key_int, value, lists, start=60, scaling=0.1, scales=(query_scales, key_scales)
    )
    exact = [
        (in_blocks(tokens.double(), block) * scale[..., None, None]).flatten(2, 3)[:, :, : tokens.shape[2]]
        for tokens, scale, block in ((query_int, query_scales, 128), (key_int, key_scales, 64))
    ]
    expected, _ = block_sparse_attention(*exact, value, lists, start=60, scaling=0.1)
    assert error_ratio(out, expected) < 1e-5


def test_low_precision_values_are_weighted_in_float32():
    query, key, value = (tensor.bfloat16() for tensor in inputs(4, 2, 90, 90))
    mask = random_mask(1, 4, BlockGrid(90, 90, 0))
    out, _ = block_sparse_attention(query, key, value, BlockLists.from_mask(mask), start=0, scaling=0.3)
    expected, _ = online(query, key, value, mask, 0, 0.3)
    assert out.dtype == torch.bfloat16
    assert error_ratio(out, expected.bfloat16()) < 1e-3


@pytest.mark.parametrize("rows,length,start", [*SHAPES, (200, 77, None), (64, 64, None)])
@pytest.mark.parametrize("query_block,key_block", [(128, 64), (16, 64), (64, 32)])
def test_the_grid_counts_pairs_one_by_one(rows, length, start, query_block, key_block):
    grid, device = BlockGrid(rows, length, start, query_block, key_block), torch.device("cpu")
    row, token = torch.arange(rows)[:, None], torch.arange(length)[None]
    sees = torch.ones(rows, length, dtype=torch.bool) if start is None else token <= start + row
    products = torch.zeros(grid.query_blocks, grid.key_blocks, dtype=torch.float64)
    partly = torch.zeros_like(products, dtype=torch.bool)
    for i, j in itertools.product(range(grid.query_blocks), range(grid.key_blocks)):
        pairs = sees[i * query_block : (i + 1) * query_block, j * key_block : (j + 1) * key_block]
        products[i, j] = pairs.sum()
        # The diagonal: some row's own token lies in the block.
        own = start is not None and any(
            (start + r) // key_block == j for r in range(i * query_block, min((i + 1) * query_block, rows))
        )
        partly[i, j] = own
    assert torch.equal(grid.products(device), products)
    assert torch.equal(grid.diagonal(device), partly)
    assert grid.total == products.sum() == sees.sum()
    seen = torch.tensor([int(line.nonzero().max()) + 1 for line in products])
    assert torch.equal(grid.visible(device), seen)


# Integers


def test_quantisation_is_off_by_half_a_scale_at_most_and_scales_are_of_blocks():
    tokens = torch.randn(2, 3, 150, 16, generator=torch.Generator().manual_seed(0))
    tokens[:, :, 64:128] *= 100
    integers, scales = quantise_blocks(tokens, 64)
    assert integers.dtype == torch.int8 and integers.shape == tokens.shape and scales.shape == (2, 3, 3)
    for block in range(3):
        span = slice(64 * block, min(64 * block + 64, 150))
        scale = scales[:, :, block, None, None]
        assert torch.allclose(scale[..., 0, 0], tokens[:, :, span].abs().amax((-1, -2)) / 127)
        assert ((integers[:, :, span] * scale - tokens[:, :, span]).abs() <= 0.5001 * scale).all()


def test_zeros_stay_zeros():
    integers, scales = quantise_blocks(torch.zeros(1, 1, 5, 8), 64)
    assert (integers == 0).all() and torch.isfinite(scales).all()


def test_smoothing_does_not_change_the_softmax():
    torch.manual_seed(0)
    key = torch.randn(1, 2, 90, 16) + 10 * torch.randn(16)
    query = torch.randn(1, 2, 7, 16)
    smooth = smooth_keys(key)
    assert error_ratio((query @ smooth.mT).softmax(-1), (query @ key.mT).softmax(-1)) < 1e-4
    assert smooth.mean(-2).abs().max() < 1e-5
