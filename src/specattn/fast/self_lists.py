"""Lists of self-speculation: what the target attended to in its last dense pass, and all tokens since."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.fast.operations import Operations
from specattn.kernels.echoes import following
from specattn.selection.base import Selection
from specattn.selection.self import FOLLOWED, Self
from specattn.target_scores import TargetScores


class SelfLists:
    """The lists of :class:`specattn.selection.self.Self`, for all layers at once.

    Args:
        scores: of the last dense passes.
        batch: requests, padding included.
        most: the most tokens that can follow a dense pass, with those of a round.
    """

    def __init__(
        self, method: Self, operations: Operations, scores: TargetScores, *, batch: int, most: int
    ) -> None:
        self.method, self.operations, self.scores, self._most = method, operations, scores, most
        _, layers, heads, length = scores.probabilities.shape
        device = scores.probabilities.device
        self._heads = (layers, heads)
        self._lists = Selection(
            # Room for all tokens since, whether a list has them or not.
            torch.full((batch, layers * heads, length + most), -1, dtype=torch.int32, device=device),
            torch.zeros(batch, layers * heads, dtype=torch.int32, device=device),
        )

    def begin(self, slots: Tensor, text: Tensor) -> None:
        """Find what was attended to, for all rounds up to the next dense pass.

        ``text`` is int32 ``[slots, length]``, what will be fed next among it.
        """
        echoes = None
        if self.method.echo:
            found = self.operations.echoes(text, slots, self.scores.ends[slots], 1, self.method.echo)
            echoes = following(found, FOLLOWED)
        self.operations.nucleus_lists(
            self.scores.probabilities.flatten(1, 2),
            self.method.p,
            self.scores.positions[slots],
            capacity=self._lists.indices.shape[-1],
            sink=self.method.sink,
            recent=self.method.window,
            out=self._lists,
            entries=slots,
            also=echoes,
            fill=False,
        )

    def select(self, slots: Tensor, ends: Tensor) -> Selection:
        """The lists ``[batch, layers, kv_heads, ...]`` of a round whose last row sees ``ends`` ``[batch]`` tokens."""
        positions, lists = self.scores.positions[slots], self._lists
        number = torch.arange(self._most, dtype=torch.int32, device=slots.device)
        since = positions[:, None] + number
        since = torch.where(since < ends[:, None], since, -1)
        places = lists.counts[..., None].long() + number
        lists.indices.scatter_(-1, places, since[:, None].expand_as(places))
        counts = lists.counts + (since >= 0).sum(-1, dtype=torch.int32)[:, None]
        return Selection(lists.indices.unflatten(1, self._heads), counts.unflatten(1, self._heads))

    def nbytes(self, slots: Tensor) -> Tensor:
        """Bytes ``[batch]`` of a layer's scores that a round reads."""
        scores = self.scores.probabilities
        return self.scores.positions[slots].double() * (scores.shape[2] * scores.element_size())
