"""A quantised copy of the keys, from which attention is estimated at a fraction of the bytes (arXiv 2502.02770)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.stores.base import KeyPool

BITS = (2, 4, 8)
"""Widths of a code; a byte holds a whole number of them."""

AFFINE_BYTES = 4
"""Scale and zero, both float16."""


@dataclass(frozen=True)
class QuantisedKeys:
    """Keys after the position embedding in ``bits`` bits a channel, each token and KV head with its own range.

    Attributes:
        bits: 2, 4 or 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"bits={self.bits} is unknown; choose one of {', '.join(map(str, BITS))}")

    @property
    def page(self) -> int:
        """Every token has its own entry."""
        return 1

    def build(self, pool: KeyPool) -> QuantisedKeysStore:
        """An empty copy for ``pool``.

        Raises:
            UsageError: if a head's codes do not fill whole bytes.
        """
        head_dim = pool.geometry.head_dim
        if head_dim * self.bits % 8:
            raise UsageError(
                f"{head_dim} channels of {self.bits} bits do not fill whole bytes; use bits=8 for this model"
            )
        return QuantisedKeysStore(pool, self.bits)

    def entry_bytes(self, head_dim: int) -> int:
        """Bytes of one token and KV head in one layer: codes, scale and zero."""
        return head_dim * self.bits // 8 + AFFINE_BYTES

    def nbytes(self, geometry: KVGeometry, tokens: int) -> int:
        """Bytes for ``tokens`` rows in all layers."""
        return tokens * geometry.layers * geometry.kv_heads * self.entry_bytes(geometry.head_dim)


class QuantisedKeysStore:
    """The copy: ``key = code * scale + zero``, where ``zero`` is the smallest channel and ``scale`` the step.

    Attributes:
        codes: for each layer uint8 ``[pool rows, kv_heads, head_dim * bits / 8]``; of the channels in a byte the first
            has the lowest bits, so with 4 bits the even channels have the low halves.
        scales, zeros: for each layer float16 ``[pool rows, kv_heads]``.
    """

    def __init__(self, pool: KeyPool, bits: int) -> None:
        self.bits = bits
        self.codes = [
            torch.zeros(*keys.shape[:2], keys.shape[2] * bits // 8, dtype=torch.uint8, device=keys.device)
            for keys in pool.keys
        ]
        self.scales, self.zeros = (
            [torch.zeros(keys.shape[:2], dtype=torch.float16, device=keys.device) for keys in pool.keys]
            for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in (self.codes, self.scales, self.zeros) for tensor in part)

    def append(self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor) -> None:
        flat = rows.flatten()
        codes, scale, zero = quantise(keys.transpose(1, 2).flatten(0, 1), self.bits)
        self.codes[layer][flat], self.scales[layer][flat], self.zeros[layer][flat] = codes, scale, zero

    def read(self, layer: int, rows: Tensor) -> Tensor:
        """Dequantised keys ``[..., kv_heads, head_dim]``, float32, of the tokens at pool rows ``[...]``."""
        codes, scale, zero = self.codes[layer][rows], self.scales[layer][rows], self.zeros[layer][rows]
        return dequantise(codes, scale, zero, self.bits)

    def gather(self, layer: int, rows: Tensor) -> Tensor:
        """The same ``[batch, kv_heads, n, head_dim]`` for a list of rows a KV head, ``[batch, kv_heads, n]``."""
        entry = rows, torch.arange(rows.shape[1], device=rows.device)[:, None]
        codes, scale, zero = self.codes[layer][entry], self.scales[layer][entry], self.zeros[layer][entry]
        return dequantise(codes, scale, zero, self.bits)


def quantise(keys: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys ``[..., head_dim]`` as uint8 codes ``[..., head_dim * bits / 8]``, float16 scale and zero ``[...]``."""
    keys, levels = keys.float(), 2**bits - 1
    low, high = keys.aminmax(dim=-1)
    zero, scale = low.half(), ((high - low) / levels).half()
    # Codes are chosen for the scale and zero that are stored, not for the exact ones.
    step = torch.where(scale > 0, scale, 1).float()
    codes = ((keys - zero.float()[..., None]) / step[..., None]).round().clamp(0, levels)
    return _pack(codes.to(torch.uint8), bits), scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Keys ``[..., head_dim]``, float32, from what :func:`quantise` returned."""
    return _unpack(codes, bits).float() * scale.float()[..., None] + zero.float()[..., None]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Neighbouring codes in one byte, the first in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        packed = packed | part << (place * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.stack([packed >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
