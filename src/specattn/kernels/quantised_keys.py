"""A quantised copy of the cached keys, from which the draft scores: 4 or 8 bits a channel, asymmetric, per token.

Quantisation follows Twilight (arXiv 2502.02770): after the position embedding, one scale and one zero a token and KV
head. With 4 bits a token costs ``head_dim / 2 + 4`` bytes, at a head dimension of 64 a seventh of its key and value
in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import check_power_of_two, check_shape

BLOCK = 32
"""Rows that one program quantises."""


@dataclass(frozen=True)
class QuantisedKeys:
    """One layer's copy: ``key = code * scale + zero`` with signed codes, so that ``zero`` lies amid the range.

    The layout puts the rows of a page side by side for each head, because a head's scores read that and nothing else.

    Attributes:
        codes: int8 ``[kv_heads, pool_rows, head_dim * bits / 8]``. Of 4 bits a byte holds two: channel ``c`` in the
            low half and channel ``c + head_dim / 2`` in the high one.
        ranges: float16 ``[kv_heads, pool_rows, 2]``: scale and zero, beside each other so that one load gets both.
        bits: 4 or 8.
    """

    codes: Tensor
    ranges: Tensor
    bits: int

    @classmethod
    def empty(cls, pool: Tensor, bits: int) -> QuantisedKeys:
        """A copy without content for a ``pool`` of keys ``[pool_rows, kv_heads, head_dim]``.

        Raises:
            UsageError: if ``bits`` is neither 4 nor 8.
        """
        if bits not in (4, 8):
            raise UsageError(f"bits={bits}: keys are quantised to 4 or 8 bits")
        rows, heads, head_dim = pool.shape
        return cls(
            torch.empty(heads, rows, head_dim * bits // 8, dtype=torch.int8, device=pool.device),
            torch.empty(heads, rows, 2, dtype=torch.float16, device=pool.device),
            bits,
        )

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes that the copy occupies."""
        return self.codes.nbytes + self.ranges.nbytes

    def dequantise(self, rows: Tensor) -> Tensor:
        """Keys of pool ``rows`` ``[n]`` as they are scored: float32 ``[n, kv_heads, head_dim]``."""
        codes = self.codes[:, rows]
        if self.bits == 4:
            codes = torch.cat([(codes << 4) >> 4, codes >> 4], dim=-1)
        scale, zero = self.ranges[:, rows, None].float().unbind(-1)
        return (codes.float() * scale + zero).transpose(0, 1)


def quantise_keys(keys: Tensor, rows: Tensor, copy: QuantisedKeys) -> None:
    """Quantise the pool's keys in ``rows`` again: after each append, for the rows that it wrote.

    A row depends on its key alone, so a row that is written anew after a rollback keeps nothing of the rejected
    token, and rows beyond a request's length are never scored.

    Args:
        keys: the pool, ``[pool_rows, kv_heads, head_dim]``.
        rows: integer ``[...]``, the pool rows that were written. Padding may name a row of page 0 many times.
        copy: the pool's quantised copy.

    Raises:
        UsageError: shapes that do not fit together.
    """
    from specattn.kernels.quantised_keys_triton import quantise_keys_kernel

    _check(keys, copy)
    rows = rows.reshape(-1)
    grid = (-(-len(rows) // BLOCK), keys.shape[1])
    quantise_keys_kernel[grid](
        keys,
        rows,
        copy.codes,
        copy.ranges,
        len(rows),
        keys.shape[0],
        keys.stride(0),
        D=copy.head_dim,
        BITS=copy.bits,
        BLOCK=BLOCK,
    )


def quantise_keys_reference(keys: Tensor, rows: Tensor, copy: QuantisedKeys) -> None:
    """The same in float32 PyTorch, equal bit for bit."""
    _check(keys, copy)
    rows = rows.reshape(-1).long()
    chosen = keys[rows].transpose(0, 1).float()
    half = 2 ** (copy.bits - 1)
    low, high = chosen.amin(-1), chosen.amax(-1)
    scale = ((high - low) / (2 * half - 1)).half()
    zero = (low + half * scale.float()).half()
    # Codes are chosen for the scale and zero that are stored, not for the exact ones.
    step = torch.where(scale == 0, 1, scale.float())
    codes = torch.floor((chosen - zero.float()[..., None]) / step[..., None] + 0.5).clamp(-half, half - 1)
    codes = codes.to(torch.int8)
    if copy.bits == 4:
        first, second = codes.chunk(2, -1)
        codes = (first & 15) | (second << 4)
    copy.codes[:, rows], copy.ranges[:, rows] = codes, torch.stack([scale, zero], dim=-1)


def _check(keys: Tensor, copy: QuantisedKeys) -> None:
    check_power_of_two("head_dim", copy.head_dim, least=32)
    rows, heads, head_dim = keys.shape
    check_shape("codes", copy.codes, heads, rows, head_dim * copy.bits // 8)
    check_shape("ranges", copy.ranges, heads, rows, 2)
    if not keys.is_contiguous():
        raise UsageError("keys must be a contiguous pool; pass the cache's own tensor")
