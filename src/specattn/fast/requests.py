"""What the device knows of each request: a round finds here what the round before it left.

None of it passes through the host, so a round can be launched before the host has read the tokens of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specattn.accounting import ReadMeter
from specattn.fast.inputs import RoundInputs
from specattn.fast.round import FastRound
from specattn.sampling import SamplingParams, SamplingState
from specattn.speculation import Batch, Outcome

READS = 3
"""Figures of a request's account: bytes that the target read, would have read in full, and that the draft read."""

PARAMETERS = ("temperature", "top_k", "top_p", "seed")
"""Tensors of a :class:`SamplingState`."""


class Requests:
    """Where the request of each slot stands, in tensors that keep their place.

    Args:
        slots: of the caches; the row behind them is that of padding: one token, which is also its previous one.
        meters: the target's and, if there is one, the draft's.

    Attributes:
        table: int64 ``[slots + 1, 4]``: length, round, previous and pending token.
        sampling: how the request of each slot draws.
    """

    def __init__(self, slots: int, device: torch.device, meters: Sequence[ReadMeter]) -> None:
        self.padding = slots
        self.table = torch.tensor([[1, 0, 0, 0]], device=device).repeat(slots + 1, 1)
        self.sampling = SamplingState.of([SamplingParams()] * (slots + 1), device)
        self._meters = meters

    def enter(self, batch: Batch) -> None:
        """Take in what the host knows of the requests of a batch."""
        slots, lengths = upload([list(batch.slots), list(batch.lengths)], self.table.device)
        self.table[slots] = torch.cat([lengths[:, None], batch.rounds[:, None], batch.recent], 1)
        for name in PARAMETERS:
            getattr(self.sampling, name)[slots] = getattr(batch.sampling, name)

    def run(self, round: FastRound) -> Tensor:
        """Run a round of the requests in its slots and move them on: its report."""
        inputs = round.inputs
        inputs.table[:, 1:] = self.table[inputs.slots]
        for name in PARAMETERS:
            getattr(inputs.sampling, name).copy_(getattr(self.sampling, name)[inputs.slots])
        outcome = round.run()
        self._advance(inputs, outcome)
        return self._report(inputs, outcome)

    def _advance(self, inputs: RoundInputs, outcome: Outcome) -> None:
        """Move the requests of a round behind what it produced; padding stays where it is."""
        tokens = torch.cat([inputs.recent[:, 1:], outcome.tokens], 1)
        last_two = outcome.counts[:, None] + torch.arange(-1, 1, device=tokens.device)
        lengths, rounds = inputs.lengths + outcome.counts, inputs.table[:, 2] + 1
        moved = torch.cat([lengths[:, None], rounds[:, None], tokens.gather(1, last_two)], 1)
        alive = (inputs.slots != self.padding)[:, None]
        self.table[inputs.slots] = torch.where(alive, moved, inputs.table[:, 1:])

    def _report(self, inputs: RoundInputs, outcome: Outcome) -> Tensor:
        """What the host wants to know of a round, in one tensor: int64 ``[batch, gamma + 2 + READS]``.

        Tokens, their count, and the account up to this round, whose float64 figures are there bit by bit. A round that
        turns out to be one too many has its own report, so that it never shows in a request's account.
        """
        target, slots = self._meters[0], inputs.slots
        account = [target.read[slots], target.full[slots]]
        account.append(self._meters[1].read[slots] if len(self._meters) > 1 else torch.zeros_like(account[0]))
        reads = torch.stack(account, 1).view(torch.int64)
        return torch.cat([outcome.tokens, outcome.counts[:, None], reads], 1)


def upload(values: Sequence[Sequence[int]] | Sequence[int], device: torch.device) -> Tensor:
    """Host numbers on ``device``, int64, without waiting for it."""
    host = torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
