"""What stands between the products of a decoder layer: kernels against their references, and those against torch."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels import add_norm, gated, rope_append
from specattn.kernels.check import error_ratio
from specattn.kernels.quantised_keys import QuantisedKeys, encode

add_norm_triton = pytest.importorskip("specattn.kernels.add_norm_triton")
gated_triton = pytest.importorskip("specattn.kernels.gated_triton")
rope_append_triton = pytest.importorskip("specattn.kernels.rope_append_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts numbers off where it makes bfloat16 of them; float16 it rounds, as a GPU does with both.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TYPES = [(torch.float32, 1e-6), (HALF, 4e-3 if torch.cuda.is_available() else 5e-4)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("rows,hidden", [(1, 48), (5, 896), (3, 1000)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_add_norm(dtype, bound, rows, hidden, has_residual):
    x, weight = randn(rows, hidden, dtype=dtype), randn(hidden, seed=1, dtype=dtype)
    residual = randn(rows, hidden, seed=2, dtype=dtype) if has_residual else None
    expected = add_norm.add_norm(x, residual, weight, 1e-6)
    normed, total = add_norm_triton.add_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected[1])
    assert error_ratio(normed, expected[0]) < bound
    exact = torch.nn.functional.rms_norm(expected[1].double(), (hidden,), weight.double(), 1e-6)
    assert error_ratio(normed, exact) < 2 * bound


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("rows,width", [(1, 7), (4, 1024), (3, 1500)])
def test_gated(dtype, bound, rows, width):
    merged = randn(rows, 2 * width, dtype=dtype)
    expected = gated.gated(merged)
    assert error_ratio(gated_triton.gated(merged), expected) < bound
    gate, up = merged.double().chunk(2, -1)
    assert error_ratio(expected, gate * gate.sigmoid() * up) < 2 * bound


@pytest.mark.parametrize("dtype,bound", TYPES)
@pytest.mark.parametrize("query_heads,kv_heads,head_dim", [(3, 1, 16), (6, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize("has_norms,bits", [(False, 0), (True, 0), (False, 4), (True, 8)])
def test_rope_append(dtype, bound, query_heads, kv_heads, head_dim, has_norms, bits):
    tokens, length, pool = 5, 40, 64
    qkv = randn(tokens, (query_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cosine, sine = randn(length, head_dim, seed=1).cos(), randn(length, head_dim, seed=1).sin()
    positions = torch.tensor([0, 7, 39, 8, 1], device=DEVICE)
    rows = torch.tensor([63, 0, 17, 31, 2], device=DEVICE)
    norms = None
    if has_norms:
        norms = (randn(head_dim, seed=3, dtype=dtype), randn(head_dim, seed=4, dtype=dtype), 1e-6)
    outputs = []
    for operation in (rope_append.rope_append, rope_append_triton.rope_append):
        keys, values = (
            torch.full((pool, kv_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)
        )
        copy = QuantisedKeys.empty(keys, bits) if bits else None
        query = operation(qkv, cosine, sine, positions, rows, keys, values, norms, copy)
        if copy is not None:
            codes, ranges = encode(keys[rows].transpose(0, 1), bits)
            assert torch.equal(copy.codes[:, rows], codes) and torch.equal(copy.ranges[:, rows], ranges)
        untouched = torch.ones(pool, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
        assert keys[untouched].isnan().all() and values[untouched].isnan().all()
        outputs.append((query, keys[rows], values[rows]))
    for reference, kernel in zip(*outputs, strict=True):
        assert error_ratio(kernel, reference) < bound
    assert torch.equal(outputs[1][2], qkv.unflatten(-1, (-1, head_dim))[:, query_heads + kv_heads :])
