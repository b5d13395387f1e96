"""BigBird's pattern (arXiv 2007.14062) in decoding: global, recent and random blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from specattn.kernels.nucleus import top_k
from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_at_least
from specattn.selection.random import random_weights


@dataclass(frozen=True)
class BigBird(Method):
    """Blocks of the context: the first ones, the most recent ones, and random ones up to the budget.

    The random blocks are drawn anew for every round, layer and KV head. The block that the round begins in counts as
    recent and is read as far as it is filled.

    Attributes:
        budget: tokens of the context that are read, in whole blocks: a fraction up to 1, a token count above. The
            round's own tokens come on top.
        block: tokens a block (64 in the paper).
        first, recent: global and window blocks (2 and 3 in the paper).
        seed: of the random blocks.
    """

    name: ClassVar[str] = "bigbird"

    budget: float = 0.1
    block: int = 64
    first: int = 2
    recent: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, self.budget)
        check_at_least(self.name, "block", self.block, 1)
        check_at_least(self.name, "first", self.first, 0)
        check_at_least(self.name, "recent", self.recent, 1)

    def prepare(self, state: RoundState) -> Selection:
        """The lists of all layers: indices ``[batch, layers, kv_heads, capacity]``."""
        blocks = -(-state.max_length // self.block)
        weights = random_weights(state, self.seed, blocks)
        filled = -(-state.starts // self.block)
        count = -(-budget_tokens(self.budget, state.starts) // self.block)
        chosen = top_k(weights, count[:, None, None], filled, sink=self.first, recent=self.recent)
        mask = chosen.repeat_interleave(self.block, -1)
        mask = pad(mask, (0, max(0, state.max_length - mask.shape[-1])))[..., : state.max_length]
        position = torch.arange(state.max_length, device=mask.device)
        starts, lengths = state.starts[:, None, None, None], state.lengths[:, None, None, None]
        return Selection.from_mask((mask | (position >= starts)) & (position < lengths))

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection)
        return state.prepared.of_layer(state.layer)
