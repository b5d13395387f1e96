"""Self-speculation: the target reads what it attended to in its last dense pass, and so drafts for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from specattn.kernels.echoes import echo_mask, echoes_reference, following
from specattn.kernels.nucleus import nucleus
from specattn.selection.base import LayerState, Method, Need, RoundState, Selection
from specattn.selection.checks import check_at_least, check_forced, check_probability

FOLLOWED = 16
"""Tokens of a stretch: about as many as are run ahead of a dense pass."""


@dataclass(frozen=True)
class Self(Method):
    """Top-p over the target's scores of its last dense pass, and every token since.

    Dense passes are those of the lossless mode and the prompt's last rows; without the lossless mode the latter remain
    the only ones.

    Attributes:
        p: share of the pass's attention, the mean of its rows and of a KV head's queries, that is read.
        echo: so many stretches of :data:`FOLLOWED` tokens are read as well, that follow earlier occurrences of what the
            round behind the pass was fed first, see :mod:`specattn.kernels.echoes`.
        sink, window: first and most recent tokens of what the pass saw that are always read.
        draft_p: share of its own attention that the draft reads, where there is a draft that proposes; 1 reads all. See
            :mod:`specattn.fast.sparse_draft`.
    """

    name: ClassVar[str] = "self"

    p: float = 0.9
    echo: int = 0
    sink: int = 4
    window: int = 16
    draft_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self.name, "p", self.p)
        check_probability(self.name, "draft_p", self.draft_p)
        check_at_least(self.name, "echo", self.echo, 0)
        check_forced(self.name, self.sink, self.window)

    @property
    def needs(self) -> Need:
        return Need.SCORES | (Need.TEXT if self.echo else Need.NOTHING)

    def prepare(self, state: RoundState) -> Selection:
        """The lists of all layers in one go: indices ``[batch, layers, kv_heads, capacity]``."""
        scores = state.scores
        assert scores is not None
        weights = pad(scores.probabilities, (0, state.max_length - scores.probabilities.shape[-1]))
        known = nucleus(weights, self.p, scores.positions, sink=self.sink, recent=self.window)
        position = torch.arange(state.max_length, device=weights.device)
        seen = position < scores.positions[:, None]
        if state.text is not None:
            found = echoes_reference(*state.text, scores.ends, 1, self.echo)
            known |= (echo_mask(following(found, FOLLOWED), state.max_length) & seen)[:, None, None]
        since = ~seen & (position < state.lengths[:, None])
        return Selection.from_mask(known | since[:, None, None])

    def select(self, state: LayerState) -> Selection:
        assert isinstance(state.prepared, Selection) and state.round.scores is not None
        return replace(state.prepared.of_layer(state.layer), extra_bytes=state.round.scores.nbytes)
