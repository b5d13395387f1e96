"""The attention mass that tokens hold which an evicting method has left in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specattn.attention import Attend, LayerCall, Step
from specattn.cache import PagedKVCache
from specattn.kernels.dense_attention import Segments, attention_logits

Add = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]


class EvictedMass:
    """Answers as ``attend`` does, and measures what share of the whole text's attention is left, layer by layer.

    Args:
        whole: a cache in whose same slots nothing was evicted; new tokens are written into it as well.
        add: takes a layer and its requests' shares and densities, each ``[kv_heads]``.
    """

    def __init__(self, attend: Attend, whole: PagedKVCache, add: Add) -> None:
        self.attend, self.whole, self.add = attend, whole, add

    def __call__(self, step: Step, call: LayerCall) -> Tensor:
        if call.window is None:
            self._follow(step, call.layer)
            requests = range(len(step.starts))
            shares = [self._share(step, call, request) for request in requests]
            self.add(call.layer, shares, [self._density(step, request) for request in requests])
        return self.attend(step, call)

    def _follow(self, step: Step, layer: int) -> None:
        """Write the step's tokens to where they stand in the whole text."""
        indices = step.positions[:, None].expand(-1, self.whole.geometry.kv_heads, -1)
        keys, values = step.cache.gather(layer, step.slots, indices)
        rows = self.whole.rows(step.slots, step.text_positions)
        self.whole.append(layer, step.slots, step.text_positions, rows, keys, values)

    def _share(self, step: Step, call: LayerCall, request: int) -> Tensor:
        slot, rows = step.host_slots[request], step.positions.shape[1]
        start = step.starts[request] + step.cache.evicted(slot)
        left, _ = step.segments(call.layer, request, None)
        whole = self.whole.segments(call.layer, slot, 0, start + rows)
        query = call.query[request]

        def log_mass(segments: Segments, start: int) -> Tensor:
            return attention_logits(query, segments, start, 0, call.scaling).logsumexp(-1)

        share = (log_mass(left, step.starts[request]) - log_mass(whole, start)).exp()
        return share.unflatten(0, (self.whole.geometry.kv_heads, -1)).mean((1, 2))

    def _density(self, step: Step, request: int) -> Tensor:
        """The share of the tokens that is left, the same for all heads."""
        left = step.starts[request] + step.positions.shape[1]
        whole = left + step.cache.evicted(step.host_slots[request])
        return torch.full((self.whole.geometry.kv_heads,), left / whole, device=step.positions.device)
