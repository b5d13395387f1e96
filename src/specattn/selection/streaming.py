"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones, whatever the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_at_least


@dataclass(frozen=True)
class Streaming(Method):
    """Attention sinks and a recent window.

    Attributes:
        budget: tokens of the context that are read, sinks included: a fraction up to 1, a token count above. The
            round's own tokens come on top.
        sink: how many of the first tokens are always read.
    """

    name: ClassVar[str] = "streaming"

    budget: float = 0.1
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, self.budget)
        check_at_least(self.name, "sink", self.sink, 0)

    def prepare(self, state: RoundState) -> Selection:
        """One list, ``[batch, 1, capacity]``: the same for all layers and heads."""
        position = torch.arange(state.max_length, device=state.starts.device)
        starts, lengths = state.starts[:, None], state.lengths[:, None]
        window = (budget_tokens(self.budget, starts) - self.sink).clamp(min=0)
        mask = (position < self.sink) | (position >= starts - window)
        return Selection.from_mask((mask & (position < lengths))[:, None])

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection)
        return state.prepared.for_heads(state.round.kv_heads)
