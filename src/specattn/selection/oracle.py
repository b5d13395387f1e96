"""The oracle: the nucleus of the target's own attention. An upper bound for evaluation; it saves no reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specattn.kernels.dense_attention import attention_probabilities
from specattn.kernels.nucleus import nucleus
from specattn.selection.base import LayerState, Method, Selection
from specattn.selection.checks import check_choice, check_forced, check_probability
from specattn.selection.groups import POLICIES, select_for_groups


@dataclass(frozen=True)
class Oracle(Method):
    """Top-p over the true scores of the round's rows.

    The reads that scoring costs are not counted: the figure says what perfect knowledge of the scores would read.

    Attributes:
        p: attention mass that the selected tokens hold at least.
        sink, window: first and most recent tokens that are always read.
        gqa: how a KV head's query heads agree: ``mean``, ``max`` or ``union``.
    """

    name: ClassVar[str] = "oracle"

    p: float = 0.95
    sink: int = 0
    window: int = 0
    gqa: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self.name, "p", self.p)
        check_forced(self.name, self.sink, self.window)
        check_choice(self.name, "gqa", self.gqa, POLICIES)

    def select(self, state: LayerState) -> Selection:
        info = state.round

        def top_p(weights: Tensor) -> Tensor:
            return nucleus(weights, self.p, info.lengths, sink=self.sink, recent=self.window + info.rows)

        mask = select_for_groups(true_scores(state), info.kv_heads, self.gqa, top_p)
        return Selection.from_mask(mask)


def true_scores(state: LayerState) -> Tensor:
    """The layer's exact attention, mean over the round's rows: float32 ``[batch, query_heads, max_length]``."""
    info = state.round
    scores = torch.zeros(
        state.queries.shape[0], info.query_heads, info.max_length, device=state.queries.device
    )
    for request, keys in enumerate(state.source.keys(state.layer)):
        start = keys.shape[0] - info.rows
        query = state.queries[request]
        rows = attention_probabilities(query, [(keys, keys)], start, 0, state.scaling)
        scores[request, :, : keys.shape[0]] = rows.mean(1)
    return scores
