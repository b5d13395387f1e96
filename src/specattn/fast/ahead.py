"""What was run ahead in a cycle of the lossless mode, on the device, until a dense pass has verified it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specattn.fast.requests import RoundInputs
from specattn.speculation import Outcome


class RunAhead:
    """The tokens that each slot's request has run ahead.

    Args:
        slots: of the caches; the row behind them is that of padding, which runs nothing ahead.
        most: the most tokens that a request can run ahead, and more than a round's beyond.

    Attributes:
        tokens: int64 ``[slots + 1, most]``: the pending token with which the cycle began, then what was run ahead.
        rounds: int64 ``[slots + 1, most]``: at a place where a round's tokens begin, how many they are; else 0.
        counts: int64 ``[slots + 1]``: tokens that were run ahead.
        wanted: int64, after how many of them a request is done.
    """

    def __init__(self, slots: int, most: int, device: torch.device) -> None:
        self.padding = slots
        self.tokens, self.rounds = (
            torch.zeros(slots + 1, most, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.wanted = torch.zeros((), dtype=torch.int64, device=device)

    def going_on(self, slots: Tensor) -> Tensor:
        """``slots``, with padding in the place of requests that are done."""
        return torch.where(self.counts[slots] < self.wanted, slots, self.padding)

    def append(self, inputs: RoundInputs, outcome: Outcome) -> None:
        """Add the tokens of a round that began with ``inputs``; what lies behind those that count is written again."""
        slots, counts = inputs.slots, self.counts[inputs.slots]
        tokens = torch.cat([inputs.recent[:, 1:], outcome.tokens], 1)
        places = counts[:, None] + torch.arange(tokens.shape[1], device=slots.device)
        self.tokens[slots[:, None], places] = tokens
        self.rounds[slots, counts] = outcome.counts
        self.counts[slots] = torch.where(slots == self.padding, 0, counts + outcome.counts)

    def beginning(self, inputs: RoundInputs) -> RoundInputs:
        """Where requests that now stand at ``inputs`` began the cycle; their previous tokens are of no use."""
        counts, first = self.counts[inputs.slots], self.tokens[inputs.slots, 0]
        table = inputs.table.clone()
        table[:, 0] -= counts
        table[:, 3] = torch.where(counts > 0, first, inputs.table[:, 3])
        return replace(inputs, table=table)

    def clear(self, slots: Tensor) -> None:
        """Their next cycle begins."""
        self.counts.index_fill_(0, slots, 0)
        self.rounds.index_fill_(0, slots, 0)
