"""The statistics that a mapping is calibrated on: both models' attention in sampled rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-10
"""Added to a draft's probabilities before a logarithm or a division: half-precision attention holds exact
zeros where the target may hold mass, and the divergence must stay finite. It adds 1e-5 over 128K tokens."""


@dataclass(frozen=True)
class RoundSample:
    """Attention over the context ``[0, L)`` of one round, averaged over its rows; every row sums to one.

    Attributes:
        target: ``[target_layers * query_heads, L]``, any floating type.
        draft: ``[draft_layers * draft_heads, L]``, on the same device.
    """

    target: Tensor
    draft: Tensor


@dataclass(frozen=True)
class Geometry:
    """The heads of both models. The methods give the distributions of a sample in float32, one a row."""

    target_layers: int
    query_heads: int
    kv_heads: int
    draft_layers: int
    draft_heads: int

    @property
    def draft_rows(self) -> int:
        """Draft heads of all layers; head ``h`` of layer ``i`` has the number ``i * draft_heads + h``."""
        return self.draft_layers * self.draft_heads

    def layer_rows(self, sample: RoundSample) -> Tensor:
        """``[target_layers, L]``: the mean over each target layer's heads."""
        return _group_mean(normalised(sample.target), self.query_heads)

    def draft_layer_rows(self, sample: RoundSample) -> Tensor:
        """``[draft_layers, L]``: the mean over each draft layer's heads."""
        return _group_mean(normalised(sample.draft), self.draft_heads)

    def query_rows(self, sample: RoundSample) -> Tensor:
        """``[target_layers * query_heads, L]``: the target's query heads."""
        return normalised(sample.target)

    def kv_rows(self, sample: RoundSample) -> Tensor:
        """``[target_layers * kv_heads, L]``: the mean over the query heads of each KV head's group."""
        return _group_mean(self.query_rows(sample), self.query_heads // self.kv_heads)

    def all_rows(self, sample: RoundSample) -> Tensor:
        """The rows of :meth:`kv_rows`, then of :meth:`query_rows`: one fit for both is the cheaper way."""
        query_rows = self.query_rows(sample)
        return torch.cat((_group_mean(query_rows, self.query_heads // self.kv_heads), query_rows))

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Undo ``all_rows``: ``[target_layers, kv_heads, ...]`` and ``[target_layers, query_heads, ...]``."""
        kv, query = values.split((self.target_layers * self.kv_heads, self.target_layers * self.query_heads))
        return kv.unflatten(0, (-1, self.kv_heads)), query.unflatten(0, (-1, self.query_heads))


Targets = Callable[[RoundSample], Tensor]
"""Which distributions ``[T, L]`` of a sample a mixture is to predict, such as ``geometry.kv_rows``."""


def normalised(rows: Tensor) -> Tensor:
    """``rows`` in float32, scaled to sum to one each: half precision leaves them off by up to 0.4 %."""
    rows = rows.to(torch.float32, copy=True)
    return rows.div_(rows.sum(-1, keepdim=True))


def _group_mean(rows: Tensor, group: int) -> Tensor:
    return rows.unflatten(0, (-1, group)).mean(1)
