"""Attention heads of a known pattern, and calls of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specattn.prefill.base import PrefillCall

BLOCK = 16
LENGTH = 640


def waves(positions: Tensor) -> Tensor:
    """Features whose products depend on the distance alone and peak at 0, as rotary embeddings do."""
    frequency = math.pi * 0.75 ** torch.arange(8)
    angle = positions[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def vertical_head(keys: list[int]) -> tuple[Tensor, Tensor]:
    """Every query looks at ``keys``."""
    key = 0.1 * torch.randn(LENGTH, 16)
    key[keys, 0] = 30.0
    query = 0.1 * torch.randn(LENGTH, 16)
    query[:, 0] = 1.0
    return query, key


def slash_head(distance: int) -> tuple[Tensor, Tensor]:
    """Every query looks ``distance`` tokens back."""
    position = torch.arange(LENGTH)
    return 8 * waves(position - distance), waves(position)


def topic_head(topics: int = 10) -> tuple[Tensor, Tensor]:
    """Stretches of text, a block long, have topics; a query looks at what has its own."""
    topic = torch.randint(topics, (LENGTH // BLOCK,)).repeat_interleave(BLOCK)
    features = torch.eye(16)[topic]
    return 30 * features, features


def local_head() -> tuple[Tensor, Tensor]:
    """A falling weight on the nearest tokens, and on the first one; the end of the text looks elsewhere."""
    position = torch.arange(LENGTH).float()
    query, key = torch.zeros(2, LENGTH, 16)
    query[:, 0], key[:, 0] = 1.0, 0.15 * position
    query[:, 1], key[0, 1] = position, 0.15
    query[-64:, 0], query[-64:, 1], query[-64:, 2], key[100:300, 2] = 0, 0, 1, 5
    return query, key


def call_of(*heads: tuple[Tensor, Tensor]) -> PrefillCall:
    """One KV head for each."""
    query, key = (torch.stack(side, dim=1) for side in zip(*heads, strict=True))
    return PrefillCall(0, query, key, torch.randn_like(key), 0, 1.0)
