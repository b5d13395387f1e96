"""What the device knows of each request: a round finds here what the round before it left.

None of it passes through the host, so a round can be launched before the host has read the tokens of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from specattn.accounting import ReadMeter
from specattn.sampling import SamplingParams, SamplingState
from specattn.speculation import Batch, Outcome

READS = 3
"""Figures of a request's account: what target and draft have read, and the target's full reads between them."""


@dataclass(frozen=True)
class RoundInputs:
    """The requests of a round, padding included.

    Attributes:
        slots: int64 ``[batch]``.
        table: int64 ``[batch, 4]``: see :class:`Requests`.
        sampling: how each request draws; what it tells the host is part of what is captured.
    """

    slots: Tensor
    table: Tensor
    sampling: SamplingState

    @property
    def lengths(self) -> Tensor:
        """int64 ``[batch]``: n, tokens in the target's cache."""
        return self.table[:, 0]

    @property
    def recent(self) -> Tensor:
        """int64 ``[batch, 2]``: the previous and the pending token."""
        return self.table[:, 2:]

    @property
    def batch(self) -> Batch:
        """The batch as the parts of a round that do not need the host know it."""
        return Batch([], [], recent=self.recent, rounds=self.table[:, 1], sampling=self.sampling)


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
        for name in _parameters(self.sampling):
            getattr(self.sampling, name)[slots] = getattr(batch.sampling, name)

    def inputs(self, slots: Tensor, asked: SamplingState) -> RoundInputs:
        """What a round of ``slots`` ``[batch]`` begins with; ``asked`` has what its sampling tells the host.

        Where nothing is drawn nobody looks at the parameters, which are left as ``asked`` has them.
        """
        if not asked.sampled:
            return RoundInputs(slots, self.table[slots], asked)
        parameters = {name: getattr(self.sampling, name)[slots] for name in _parameters(self.sampling)}
        return RoundInputs(slots, self.table[slots], replace(asked, **parameters))

    def advance(self, inputs: RoundInputs, outcome: Outcome) -> None:
        """Move the requests of a round behind what it produced; padding stays where it is."""
        tokens = torch.cat([inputs.recent[:, 1:], outcome.tokens], 1)
        last_two = outcome.counts[:, None] + torch.arange(-1, 1, device=tokens.device)
        moved = torch.cat(
            [
                (inputs.lengths + outcome.counts)[:, None],
                inputs.table[:, 1:2] + 1,
                tokens.gather(1, last_two),
            ],
            1,
        )
        alive = (inputs.slots != self.padding)[:, None]
        self.table[inputs.slots] = torch.where(alive, moved, inputs.table)

    def report(self, inputs: RoundInputs, outcome: Outcome) -> Tensor:
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


def _parameters(state: SamplingState) -> list[str]:
    """Names of a state's tensors."""
    return [field.name for field in fields(state) if isinstance(getattr(state, field.name), Tensor)]
