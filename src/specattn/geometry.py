"""The attention geometry of a model: what a KV cache and a cost account need to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KVGeometry:
    """Shapes of one model's attention.

    Attributes:
        layers: number of decoder layers.
        query_heads, kv_heads: heads of Q and of K, V; ``query_heads`` is a multiple of ``kv_heads``.
        head_dim: channels a head.
        dtype: element type of the cache.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype) -> KVGeometry:
        """Read the geometry from a transformers configuration."""
        query_heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
            dtype=dtype,
        )

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer and one KV head."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return self.layers * self.kv_heads * self.row_bytes
