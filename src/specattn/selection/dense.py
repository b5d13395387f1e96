"""Dense attention: everything visible is read. The reference, and plain speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from specattn.selection.base import LayerState, Method, RoundState, Selection


@dataclass(frozen=True)
class Dense(Method):
    """Read everything. Wrapped by another method, it offers every token as a candidate."""

    name: ClassVar[str] = "dense"

    def prepare(self, state: RoundState) -> Selection:
        """One list, ``[batch, 1, capacity]``: the same for all layers and heads."""
        position = torch.arange(state.max_length, device=state.starts.device)
        return Selection.from_mask((position < state.lengths[:, None])[:, None])

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection)
        return state.prepared.for_heads(state.round.kv_heads)

    def is_dense(self, layer: int) -> bool:
        return True
