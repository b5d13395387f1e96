"""A quantised copy of the keys, from which attention is estimated at a fraction of the bytes (arXiv 2502.02770)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.geometry import KVGeometry
from specattn.kernels.device import has_kernels
from specattn.kernels.quantised_keys import (
    RANGE_BYTES,
    code_bytes,
    quantise_keys,
    quantise_keys_reference,
)
from specattn.kernels.quantised_keys import QuantisedKeys as LayerCopy
from specattn.stores.base import KeyPool

if TYPE_CHECKING:
    from specattn.cache import PagedKVCache

AT_ONCE = 1 << 16
"""Pool rows that are quantised at once where all are: what PyTorch needs for it is many times their size."""


@dataclass(frozen=True)
class QuantisedKeys:
    """Keys after the position embedding in ``bits`` bits a channel, each token and KV head with its own range.

    Attributes:
        bits: 2, 4 or 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        code_bytes(8, self.bits)

    @property
    def page(self) -> int:
        """Every token has its own entry."""
        return 1

    def build(self, pool: KeyPool) -> QuantisedKeysStore:
        """An empty copy for ``pool``.

        Raises:
            UsageError: if a head's codes do not fill whole bytes.
        """
        return QuantisedKeysStore(pool, self.bits)

    def entry_bytes(self, head_dim: int) -> int:
        """Bytes of one token and KV head in one layer: codes, scale and zero."""
        return code_bytes(head_dim, self.bits) + RANGE_BYTES

    def nbytes(self, geometry: KVGeometry, tokens: int) -> int:
        """Bytes for ``tokens`` rows in all layers."""
        return tokens * geometry.layers * geometry.kv_heads * self.entry_bytes(geometry.head_dim)


class QuantisedKeysStore:
    """The copies of all layers, in the format of :mod:`specattn.kernels.quantised_keys`.

    Attributes:
        layers: a copy a layer.
        whole: of all layers, the first one's heads first, where all are of one length: the layers are views of it.
    """

    def __init__(self, pool: KeyPool, bits: int) -> None:
        self.pool = pool
        self.whole: LayerCopy | None = None
        if len({len(keys) for keys in pool.keys}) == 1:
            self.whole = LayerCopy.empty(pool.keys[0], bits, layers=len(pool.keys))
            self.layers = self.whole.split(len(pool.keys))
        else:
            self.layers = [LayerCopy.empty(keys, bits) for keys in pool.keys]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token and KV head in one layer."""
        return self.layers[0].codes.shape[-1] + RANGE_BYTES

    def append(self, layer: int, slots: Tensor, positions: Tensor, rows: Tensor, keys: Tensor) -> None:
        self._quantise(layer, rows)

    def follow(self) -> None:
        """Quantise all keys of the pool anew, after something else than appends has changed them."""
        for layer, keys in enumerate(self.pool.keys):
            for rows in torch.arange(len(keys), device=keys.device).split(AT_ONCE):
                self._quantise(layer, rows)

    def _quantise(self, layer: int, rows: Tensor) -> None:
        pool, copy = self.pool.keys[layer], self.layers[layer]
        kernel = copy.has_kernels and has_kernels(pool.device)
        (quantise_keys if kernel else quantise_keys_reference)(pool, rows, copy)


def quantised_keys_of(cache: PagedKVCache) -> QuantisedKeysStore | None:
    """The quantised keys that a cache keeps, if it does."""
    stores = (store for store in cache.stores.values() if isinstance(store, QuantisedKeysStore))
    return next(stores, None)
