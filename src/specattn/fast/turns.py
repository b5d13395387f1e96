"""Whose keys a round of a sparse draft reads once more, after its steps: KV heads are scored by turns.

What the mapping mixes is needed of every round: KV heads with a query head that it uses are scored each time. The
scores of the others decide about their own lists alone, that is, about how many proposals are accepted, and attention
moves slowly: they may be a few rounds old.
"""

from __future__ import annotations

import torch
from torch import Tensor

TURNS = 8
"""Rounds in which each KV head is scored at least once."""


class Turns:
    """The KV heads of all layers, shared out over rounds.

    Args:
        places: ``[layers, query_heads]``, 0 or more where a head is exported to the mapping; see
            :func:`specattn.kernels.score_export.export_places`.
        kv_heads: of a layer.

    Attributes:
        count: rounds from one time that a head is scored to the next, at most: 1 if all are scored in each.
    """

    def __init__(self, places: Tensor, kv_heads: int) -> None:
        always = (places >= 0).unflatten(1, (kv_heads, -1)).any(-1).flatten()
        self.count = 1 if bool(always.all()) else TURNS
        # Counted among themselves, so that as many have their turn in one round as in another.
        turn = (~always).cumsum(0) % TURNS
        rounds = torch.arange(TURNS + 1, device=places.device)[:, None]
        self._due = always | (rounds == 0) | (rounds % TURNS == turn)

    def due(self, rounds: Tensor) -> Tensor:
        """Which heads are scored, bool ``[batch, layers * kv_heads]``.

        Args:
            rounds: int64 ``[batch]``, 0 in a request's first round, which scores all, and then what :func:`following`
                says.
        """
        return self._due[rounds]


def following(rounds: Tensor) -> Tensor:
    """The numbers of the next rounds: from 1 to :data:`TURNS`, and again."""
    return rounds % TURNS + 1
