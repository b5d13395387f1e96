"""Longformer's pattern (arXiv 2004.05150) in decoding: a sliding window, dilated or not, and global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from specattn.selection.base import RoundState, Selection
from specattn.selection.budget import budget_tokens
from specattn.selection.checks import check_at_least
from specattn.selection.streaming import Streaming


@dataclass(frozen=True)
class Longformer(Streaming):
    """The first tokens as global ones, and a window whose tokens lie ``dilation`` apart.

    Where the window has reached the global tokens and the budget is not used up, it takes the most recent of the tokens
    that it has passed over; so a budget of 1 reads everything.

    Attributes:
        budget: tokens of the context that are read, global ones included: a fraction up to 1, a token count above. The
            round's own tokens come on top.
        sink: global tokens, the context's first.
        dilation: every how many tokens the window takes one; 1 is a plain window.
    """

    name: ClassVar[str] = "longformer"

    sink: int = 64
    dilation: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.name, "dilation", self.dilation, 1)

    def prepare(self, state: RoundState) -> Selection:
        position = torch.arange(state.max_length, device=state.starts.device)
        starts, lengths = state.starts[:, None], state.lengths[:, None]
        window = (budget_tokens(self.budget, starts) - self.sink).clamp(min=0)
        age = starts - 1 - position
        dilated = age % self.dilation == 0
        reachable = ((starts - self.sink).clamp(min=0) + self.dilation - 1) // self.dilation
        passed_over = age - age // self.dilation - 1  # how many such tokens are more recent
        taken = torch.where(dilated, age // self.dilation < window, passed_over < window - reachable)
        mask = (position < self.sink) | (age < 0) | taken
        return Selection.from_mask((mask & (position < lengths))[:, None])
