"""A quantised copy of the cached keys, from which scores are made: asymmetric, a range for each token and KV head.

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

BITS = (2, 4, 8)
"""Widths of a code; a byte holds a whole number of them."""

KERNEL_BITS = (4, 8)
LEAST_CHANNELS = 32
"""What the kernels take; the rest is left to PyTorch."""

RANGE_BYTES = 4
"""Scale and zero, both float16."""

BLOCK = 32
"""Rows that one program quantises."""


@dataclass(frozen=True)
class QuantisedKeys:
    """One layer's copy: ``key = code * scale + zero`` with signed codes, so that ``zero`` lies amid the range.

    Several layers together are one copy with the heads of all.

    The layout puts the rows of a page side by side for each head, because a head's scores read that and nothing else.

    Attributes:
        codes: int8 ``[kv_heads, pool_rows, head_dim * bits / 8]``. A byte holds ``8 / bits`` codes, whose channels lie
            ``head_dim * bits / 8`` apart, the first in the lowest bits: of 4 bits it holds channel ``c`` in the low
            half and channel ``c + head_dim / 2`` in the high one.
        ranges: float16 ``[kv_heads, pool_rows, 2]``: scale and zero, beside each other so that one load gets both.
        bits: 2, 4 or 8.
    """

    codes: Tensor
    ranges: Tensor
    bits: int

    @classmethod
    def empty(cls, pool: Tensor, bits: int, layers: int = 1) -> QuantisedKeys:
        """A copy without content for ``layers`` pools like ``pool``, keys ``[pool_rows, kv_heads, head_dim]``.

        Raises:
            UsageError: see :func:`code_bytes`.
        """
        rows, heads, head_dim = pool.shape
        heads *= layers
        return cls(
            torch.empty(heads, rows, code_bytes(head_dim, bits), dtype=torch.int8, device=pool.device),
            torch.empty(heads, rows, 2, dtype=torch.float16, device=pool.device),
            bits,
        )

    def split(self, layers: int) -> list[QuantisedKeys]:
        """Views of each of ``layers`` layers."""
        parts = zip(self.codes.chunk(layers), self.ranges.chunk(layers), strict=True)
        return [QuantisedKeys(codes, ranges, self.bits) for codes, ranges in parts]

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes that the copy occupies."""
        return self.codes.nbytes + self.ranges.nbytes

    @property
    def has_kernels(self) -> bool:
        """Whether Triton kernels take its shape."""
        size = self.head_dim
        return self.bits in KERNEL_BITS and size >= LEAST_CHANNELS and not size & (size - 1)

    def dequantise(self, rows: Tensor) -> Tensor:
        """Keys of pool ``rows`` ``[...]`` as they are scored: float32 ``[..., kv_heads, head_dim]``."""
        return decode(self.codes[:, rows], self.ranges[:, rows], self.bits).movedim(0, -2)

    def gather(self, rows: Tensor) -> Tensor:
        """The same ``[batch, kv_heads, n, head_dim]`` for a list of pool rows a KV head, ``[batch, kv_heads, n]``."""
        entry = torch.arange(rows.shape[1], device=rows.device)[:, None], rows
        return decode(self.codes[entry], self.ranges[entry], self.bits)


def code_bytes(head_dim: int, bits: int) -> int:
    """Bytes of the codes of a key.

    Raises:
        UsageError: there are no codes of so many bits, or they do not fill whole bytes.
    """
    if bits not in BITS:
        raise UsageError(f"bits={bits} is unknown; choose one of {', '.join(map(str, BITS))}")
    if head_dim * bits % 8:
        raise UsageError(
            f"{head_dim} channels of {bits} bits do not fill whole bytes; use bits=8 for this model"
        )
    return head_dim * bits // 8


def encode(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Keys ``[..., head_dim]`` as codes ``[..., head_dim * bits / 8]`` and ranges ``[..., 2]``."""
    keys, half = keys.float(), 2 ** (bits - 1)
    low, high = keys.aminmax(dim=-1)
    scale = ((high - low) / (2 * half - 1)).half()
    zero = (low + half * scale.float()).half()
    # Codes are chosen for the scale and zero that are stored, not for the exact ones.
    step = torch.where(scale == 0, 1, scale.float())
    codes = torch.floor((keys - zero.float()[..., None]) / step[..., None] + 0.5).clamp(-half, half - 1)
    return _pack(codes.to(torch.int8), bits), torch.stack([scale, zero], dim=-1)


def decode(codes: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """Keys ``[..., head_dim]``, float32, from what :func:`encode` returned."""
    # Up to the sign bit and down again: the sign is kept.
    parts = [(codes << (8 - bits - shift)) >> (8 - bits) for shift in range(0, 8, bits)]
    scale, zero = ranges.float()[..., None, :].unbind(-1)
    return torch.cat(parts, dim=-1).float() * scale + zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    parts = (codes.view(torch.uint8) & (2**bits - 1)).chunk(8 // bits, -1)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        packed = packed | part << (place * bits)
    return packed.view(torch.int8)


def quantise_keys(keys: Tensor, rows: Tensor, copy: QuantisedKeys) -> None:
    """Quantise the pool's keys in ``rows`` again: after each append, for the rows that it wrote.

    A row depends on its key alone, so a row that is written anew after a rollback keeps nothing of the rejected
    token, and rows beyond a request's length are never scored.

    Args:
        keys: the pool, ``[pool_rows, kv_heads, head_dim]``.
        rows: integer ``[...]``, the pool rows that were written. Padding may name a row of page 0 many times.
        copy: the pool's quantised copy.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.quantised_keys_triton import quantise_keys_kernel

    _check(keys, copy)
    _check_kernel(keys, copy)
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
    """The same in float32 PyTorch, equal bit for bit; takes all bits and any number of channels."""
    _check(keys, copy)
    rows = rows.flatten().long()
    copy.codes[:, rows], copy.ranges[:, rows] = encode(keys[rows].transpose(0, 1), copy.bits)


def _check(keys: Tensor, copy: QuantisedKeys) -> None:
    rows, heads, head_dim = keys.shape
    check_shape("codes", copy.codes, heads, rows, head_dim * copy.bits // 8)
    check_shape("ranges", copy.ranges, heads, rows, 2)


def _check_kernel(keys: Tensor, copy: QuantisedKeys) -> None:
    if copy.bits not in KERNEL_BITS:
        raise UsageError(f"bits={copy.bits}: the kernels take 4 or 8; use quantise_keys_reference")
    check_power_of_two("head_dim", copy.head_dim, least=LEAST_CHANNELS)
    if not keys.is_contiguous():
        raise UsageError("keys must be a contiguous pool; pass the cache's own tensor")
