"""Self-speculation: the target reads what it attended to in its last dense pass, and so drafts for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from specattn.kernels.nucleus import nucleus
from specattn.selection.base import LayerState, Method, Need, RoundState, Selection
from specattn.selection.checks import check_forced, check_probability


@dataclass(frozen=True)
class Self(Method):
    """Top-p over the target's scores of its last dense pass, and every token since.

    Dense passes are those of the lossless mode and the prompt's last rows; without the lossless mode the latter remain
    the only ones.

    Attributes:
        p: share of the pass's attention, the mean of its rows and of a KV head's queries, that is read.
        sink, window: first and most recent tokens of what the pass saw that are always read.
    """

    name: ClassVar[str] = "self"

    p: float = 0.9
    sink: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self.name, "p", self.p)
        check_forced(self.name, self.sink, self.window)

    @property
    def needs(self) -> Need:
        return Need.SCORES

    def prepare(self, state: RoundState) -> Selection:
        """The lists of all layers in one go: indices ``[batch, layers, kv_heads, capacity]``."""
        scores = state.scores
        assert scores is not None
        weights = pad(scores.probabilities, (0, state.max_length - scores.probabilities.shape[-1]))
        known = nucleus(weights, self.p, scores.positions, sink=self.sink, recent=self.window)
        position = torch.arange(state.max_length, device=weights.device)
        since = (position >= scores.positions[:, None]) & (position < state.lengths[:, None])
        return Selection.from_mask(known | since[:, None, None])

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection) and state.round.scores is not None
        return replace(state.prepared.of_layer(state.layer), extra_bytes=state.round.scores.nbytes)
