"""The Triton kernel of :mod:`specattn.kernels.rope_append`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specattn.kernels.quantised_keys import QuantisedKeys
from specattn.kernels.quantised_keys_triton import store_codes


def rope_append(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    copy: QuantisedKeys | None = None,
) -> Tensor:
    """:func:`specattn.kernels.rope_append.rope_append` as one launch; ``head_dim`` must be a power of two."""
    tokens = qkv.shape[0]
    _, kv_heads, head_dim = keys.shape
    query_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(tokens, query_heads, head_dim)
    query_norm, key_norm, eps = norms if norms is not None else (None, None, 0.0)
    rope_append_kernel[(tokens, query_heads + 2 * kv_heads)](
        qkv, cosine, sine, positions, rows, query, keys, values, query_norm, key_norm, eps,
        None if copy is None else copy.codes, None if copy is None else copy.ranges, len(keys),
        QUERY_HEADS=query_heads, KV_HEADS=kv_heads, HALF=head_dim // 2, NORMED=norms is not None,
        BITS=0 if copy is None else copy.bits, num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def rope_append_kernel(
    qkv, cosine, sine, positions, rows, query, keys, values, query_norm, key_norm, eps,
    codes, ranges, pool_rows,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF)
    source = qkv + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    first, second = tl.load(source + half), tl.load(source + HALF + half)
    dtype = first.dtype
    row = tl.load(rows + token)
    if head >= QUERY_HEADS + KV_HEADS:
        out = values + (row * KV_HEADS + head - QUERY_HEADS - KV_HEADS) * 2 * HALF
    else:
        is_key = head >= QUERY_HEADS
        if is_key:
            out = keys + (row * KV_HEADS + head - QUERY_HEADS) * 2 * HALF
        else:
            out = query + (token * QUERY_HEADS + head) * 2 * HALF
        x, y = first.to(tl.float32), second.to(tl.float32)
        if NORMED:
            scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / (2 * HALF) + eps)
            if is_key:
                gain_x, gain_y = tl.load(key_norm + half), tl.load(key_norm + HALF + half)
            else:
                gain_x, gain_y = tl.load(query_norm + half), tl.load(query_norm + HALF + half)
            x = (gain_x * (x * scale).to(dtype)).to(tl.float32)
            y = (gain_y * (y * scale).to(dtype)).to(tl.float32)
        place = tl.load(positions + token) * 2 * HALF + half
        first, second = rotated(x, y, cosine, sine, place, True, HALF, dtype)
    tl.store(out + half, first)
    tl.store(out + HALF + half, second)
    # The first is known when the kernel is compiled, the second is not.
    if codes is not None:  # noqa: SIM102
        if (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS):
            # Of what was stored: in the codes' layout the norm might be summed anew, in another order.
            tl.debug_barrier()
            stored = tl.load(out + half), tl.load(out + HALF + half)
            entry = tl.full([1], (head - QUERY_HEADS).to(tl.int64) * pool_rows + row, tl.int64)
            halves = stored[0].to(tl.float32)[None, :], stored[1].to(tl.float32)[None, :]
            store_codes(halves[0], halves[1], codes, ranges, entry, entry >= 0, 2 * HALF, BITS)


@triton.jit
def rotated(x, y, cosine, sine, place, known, HALF: tl.constexpr, dtype: tl.constexpr):
    """The halves ``x`` and ``y``, float32, of heads, rotated by the tables' entries at ``place``, in ``dtype``."""
    cos_x = tl.load(cosine + place, mask=known, other=0.0).to(dtype)
    cos_y = tl.load(cosine + place + HALF, mask=known, other=0.0).to(dtype)
    sin_x = tl.load(sine + place, mask=known, other=0.0).to(dtype)
    sin_y = tl.load(sine + place + HALF, mask=known, other=0.0).to(dtype)
    # Each product is rounded, as the operations of the reference are.
    first = _rounded(x, cos_x) - _rounded(y, sin_x)
    second = _rounded(y, cos_y) + _rounded(x, sin_y)
    return first.to(dtype), second.to(dtype)


@triton.jit
def _rounded(x, y):
    """The product in the dtype of ``y``, as float32."""
    return (x * y.to(tl.float32)).to(y.dtype).to(tl.float32)
