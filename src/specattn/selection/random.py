"""Uniformly random tokens: the lower bound that any selection must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specattn.kernels.nucleus import top_k
from specattn.sampling import uniform
from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_forced


@dataclass(frozen=True)
class Random(Method):
    """A fresh uniform sample, without replacement, for every round, layer and KV head.

    Attributes:
        budget: tokens of the context that are read: a fraction up to 1, a token count above. The round's own tokens
            come on top.
        sink, window: first and most recent tokens that are always read, within the budget.
        seed: of the sample, which also depends on where the round begins.
    """

    name: ClassVar[str] = "random"

    budget: float = 0.1
    sink: int = 4
    window: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, self.budget)
        check_forced(self.name, self.sink, self.window)

    def prepare(self, state: RoundState) -> Selection:
        """The lists of all layers: indices ``[batch, layers, kv_heads, capacity]``."""
        weights = random_weights(state, self.seed)
        count = budget_tokens(self.budget, state.starts) + state.rows
        recent = self.window + state.rows
        return Selection.from_mask(
            top_k(weights, count[:, None, None], state.lengths, sink=self.sink, recent=recent)
        )

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection)
        return state.prepared.of_layer(state.layer)


def random_weights(state: RoundState, seed: int, per_head: int | None = None, stream: int = 0) -> Tensor:
    """Independent uniform numbers ``[batch, layers, kv_heads, n]``, ``n`` the round's length or ``per_head``.

    They depend on the seed, on where a request's round begins and on the ``stream``, not on its neighbours.
    """
    lists = torch.arange(state.layers * state.kv_heads, device=state.starts.device)
    numbers = round_numbers(state.starts, seed, lists, per_head or state.max_length, stream)
    return numbers.unflatten(1, (state.layers, state.kv_heads))


def layer_weights(state: RoundState, layer: int, seed: int, stream: int) -> Tensor:
    """The numbers ``[batch, kv_heads, length]`` of one layer; each ``stream`` has its own, see ``sampling.Stream``."""
    first = layer * state.kv_heads
    lists = torch.arange(first, first + state.kv_heads, device=state.starts.device)
    return round_numbers(state.starts, seed, lists, state.max_length, stream)


def round_numbers(starts: Tensor, seed: int, lists: Tensor, count: int, stream: int) -> Tensor:
    """``[batch, lists, count]`` of the rounds that begin at ``starts`` ``[batch]``, for the numbered ``lists``."""
    # 2**32 numbers a list are never used up, so lists do not overlap.
    counters = lists[:, None] * 2**32 + torch.arange(count, device=lists.device)
    seeds = torch.full_like(starts, seed, dtype=torch.int64) * 2**32 + starts
    return uniform(seeds, counters[None], stream)
