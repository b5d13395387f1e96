"""Oracle top-k: the tokens that the target's own attention weighs most, a fixed number. For evaluation only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from specattn.kernels.nucleus import top_k
from specattn.selection.base import LayerState, Method, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_choice, check_forced
from specattn.selection.groups import POLICIES, select_for_groups
from specattn.selection.oracle import true_scores


@dataclass(frozen=True)
class TopK(Method):
    """The heaviest tokens of the round's rows by true scores.

    The reads that scoring costs are not counted, as for ``oracle``; beside it, this shows what a fixed number costs
    where the attention is now flat, now peaked.

    Attributes:
        budget: tokens of the context that are read: a fraction up to 1, a token count above. The round's own tokens
            come on top; with ``gqa=union`` the lists of a group's heads are joined.
        sink, window: first and most recent tokens that are always read, within the budget.
        gqa: how a KV head's query heads agree: ``mean``, ``max`` or ``union``.
    """

    name: ClassVar[str] = "topk"

    budget: float = 0.1
    sink: int = 4
    window: int = 16
    gqa: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, self.budget)
        check_forced(self.name, self.sink, self.window)
        check_choice(self.name, "gqa", self.gqa, POLICIES)

    def select(self, state: LayerState) -> Selection:
        info = state.round
        count = budget_tokens(self.budget, info.starts) + info.rows

        def heaviest(weights: Tensor) -> Tensor:
            return top_k(
                weights, count[:, None], info.lengths, sink=self.sink, recent=self.window + info.rows
            )

        return Selection.from_mask(select_for_groups(true_scores(state), info.kv_heads, self.gqa, heaviest))
