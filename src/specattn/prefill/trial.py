"""Thresholds on trial: a dense prefill that looks, on the side, at what they would have done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specattn.geometry import KVGeometry
from specattn.kernels.blocks import BlockGrid
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.thresholds import Thresholds
from specattn.prefill.two_stage import two_stage_attention

Candidates = Callable[[int], Sequence[Thresholds]]
"""The thresholds to try in a layer: equally many in each."""


@dataclass(frozen=True)
class Trial(PrefillMethod):
    """Runs every candidate beside dense attention, whose output goes on; sums are kept, nothing else.

    Attributes:
        candidates: what to try in each layer.
        int8: as in SpargeAttn.
        error, norm: sums of ``|sparse - dense|`` and ``|dense|`` over rows and channels, float64
            ``[layers, heads, candidates]`` and ``[layers, heads]``.
        computed, skipped: query-key products that were computed, and those whose values were skipped, the shape of
            ``error``.
        total: visible query-key products, float64 ``[layers]``.
    """

    name: ClassVar[str] = "trial"

    candidates: Candidates
    int8: bool
    error: Tensor
    norm: Tensor
    computed: Tensor
    skipped: Tensor
    total: Tensor

    @classmethod
    def of(cls, candidates: Candidates, int8: bool, geometry: KVGeometry, device: torch.device) -> Trial:
        """A trial that has seen nothing yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        heads = (geometry.layers, geometry.query_heads)
        count = len(candidates(0))
        error, computed, skipped = (zeros(*heads, count) for _ in range(3))
        return cls(candidates, int8, error, zeros(*heads), computed, skipped, zeros(geometry.layers))

    def attention(self, call: PrefillCall) -> PrefillOutput:
        layer, dense = (
            call.layer,
            dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling),
        )
        exact = dense.transpose(0, 1).float()
        products = BlockGrid(call.query.shape[0], call.key.shape[0], call.start).total
        self.norm[layer] += exact.abs().sum((1, 2))
        self.total[layer] += products
        query, key, value = (tokens.transpose(0, 1)[None] for tokens in (call.query, call.key, call.value))
        for number, thresholds in enumerate(self.candidates(layer)):
            result = two_stage_attention(
                query, key, value, thresholds, start=call.start, scaling=call.scaling, int8=self.int8
            )
            self.error[layer, :, number] += (result.out[0].float() - exact).abs().sum((1, 2))
            self.computed[layer, :, number] += result.computed[0] * products
            self.skipped[layer, :, number] += result.skipped[0] * products
        return PrefillOutput(dense, dense.new_ones(()))

    @property
    def l1(self) -> Tensor:
        """Relative L1 error ``[layers, heads, candidates]``; 0 in layers that were not asked."""
        return self.error / self.norm.clamp(min=torch.finfo(torch.float64).tiny)[..., None]

    @property
    def sparsity(self) -> Tensor:
        """Share of both matrix products left out ``[layers, heads, candidates]``; 0 in layers that were not asked."""
        done = (self.computed - self.skipped / 2) / self.total.clamp(min=1)[:, None, None]
        return torch.where(self.total[:, None, None] > 0, 1 - done, 0)
