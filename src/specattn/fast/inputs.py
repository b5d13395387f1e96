"""What a round is told, in tensors that keep their place: a captured graph reads them again in every replay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.sampling import SamplingParams, SamplingState
from specattn.speculation import Batch

COLUMNS = 5  # slot, length, round, previous token, pending token


@dataclass(frozen=True)
class RoundInputs:
    """The requests of a batch, padded to a fixed number.

    Attributes:
        table: int64 ``[batch, 5]``; padding has the cache's spare slot and one token, which is also its previous one.
        sampling: how each request draws; what it tells the host is part of what is captured.
        padding: int64 ``[batch, 5]``, the table of padding alone.
    """

    table: Tensor
    sampling: SamplingState
    padding: Tensor

    @classmethod
    def allocate(cls, batch: int, sampling: SamplingState, spare: int, device: torch.device) -> RoundInputs:
        """Inputs of padding alone, which tell the host what ``sampling`` tells it."""
        padding = torch.tensor([[spare, 1, 0, 0, 0]], device=device).repeat(batch, 1)
        greedy = SamplingState.of([SamplingParams()] * batch, device)
        return cls(padding.clone(), greedy.like(sampling), padding)

    @property
    def slots(self) -> Tensor:
        """int64 ``[batch]``."""
        return self.table[:, 0]

    @property
    def batch(self) -> Batch:
        """The batch as the parts of a round that do not need the host know it."""
        return Batch([], [], recent=self.recent, rounds=self.table[:, 2], sampling=self.sampling)

    @property
    def lengths(self) -> Tensor:
        """int64 ``[batch]``: n, tokens in the target's cache."""
        return self.table[:, 1]

    @property
    def recent(self) -> Tensor:
        """int64 ``[batch, 2]``: the previous and the pending token."""
        return self.table[:, 3:]

    def load(self, batch: Batch) -> None:
        """Take the requests of a round in; the places behind them become padding."""
        count = len(batch.slots)
        places = torch.tensor([batch.slots, batch.lengths]).T
        if self.table.is_cuda:
            places = places.pin_memory()
        self.table.copy_(self.padding)
        self.table[:count, :2].copy_(places, non_blocking=True)
        self.table[:count, 2].copy_(batch.rounds)
        self.table[:count, 3:].copy_(batch.recent)
        self.sampling.load(batch.sampling)
