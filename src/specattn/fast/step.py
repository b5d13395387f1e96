"""What a dense and a sparse draft's steps have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from specattn.fast.decoder import AttendLayer
from specattn.fast.model import FastModel, steps


class Step(ABC):
    """Feeds tokens to the draft; how its layers attend is left open.

    Attributes:
        model: the draft.
    """

    model: FastModel

    def logits(self, fed: Tensor, slots: Tensor, starts: Tensor, row: int) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` after the tokens ``fed`` ``[batch, rows]`` at positions from ``starts``."""
        positions = steps(starts, fed.shape[1])
        return self.model.logits(fed, slots, positions, self._attend(slots, positions, row), 1)

    def read(self, fed: Tensor, slots: Tensor, starts: Tensor, row: int) -> None:
        """The same for the sake of its attention alone."""
        positions = steps(starts, fed.shape[1])
        self.model.read(fed, slots, positions, self._attend(slots, positions, row))

    @abstractmethod
    def _attend(self, slots: Tensor, positions: Tensor, row: int) -> AttendLayer:
        """Attention of the step number ``row`` of a round."""


def seen_by_steps(lengths: Tensor, steps: int) -> Tensor:
    """Tokens ``[batch]`` that the steps of a round behind ``lengths`` see, the first one more than these: their sum."""
    return lengths * steps + steps * (steps + 1) // 2
