"""Column sums of the attention matrix against a float64 reading, in blocks of odd sizes."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels import received_attention as kernel
from specattn.kernels.check import error_ratio


@pytest.mark.parametrize("query_heads,kv_heads", [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("rows,start", [(1, 0), (1, 36), (5, 32), (37, 0)])
@pytest.mark.parametrize("block", [1, 3 * 6 * 37, 1 << 25])
@pytest.mark.parametrize("cuts", [[], [4, 5]])
def test_each_token_gets_what_the_rows_give_it(query_heads, kv_heads, rows, start, block, cuts, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    generator = torch.Generator().manual_seed(rows + start)
    length = start + rows
    query = torch.randn(rows, query_heads, 12, generator=generator)
    key = torch.randn(length, kv_heads, 12, generator=generator)
    value = torch.full_like(key, float("nan"))
    expected = torch.zeros(query_heads, length, dtype=torch.float64)
    for head in range(query_heads):
        for row in range(rows):
            visible = key[: start + row + 1, head // (query_heads // kv_heads)].double()
            expected[head, : start + row + 1] += (visible @ query[row, head].double() * 0.3).softmax(0)
    cuts = [cut for cut in cuts if cut < length]
    segments = list(zip(torch.tensor_split(key, cuts), torch.tensor_split(value, cuts), strict=True))
    received = kernel.received_attention(query, segments, start, 0.3)
    assert received.dtype == torch.float32
    assert error_ratio(received, expected) < 1e-5
    assert torch.allclose(received.sum(-1), torch.full((query_heads,), float(rows)))
