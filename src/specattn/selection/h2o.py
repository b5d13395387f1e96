"""H2O (arXiv 2306.14048): the tokens that have got most attention so far, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus import top_k
from specattn.selection.checks import check_at_least
from specattn.selection.eviction import Evicting


@dataclass(frozen=True)
class H2O(Evicting):
    """Heavy hitters and recent tokens; whatever exceeds the budget is dropped as decoding goes on.

    Attributes:
        budget: tokens that stay: a fraction of the context up to 1, which grows with it, or a token count.
        heavy: share of the budget that goes to heavy hitters; the rest are the most recent tokens.
        every: tokens that the cache gathers above the budget before some are dropped. 1 is the paper's way; more
            moves what is kept less often.
    """

    name: ClassVar[str] = "h2o"
    accumulates: ClassVar[bool] = True

    budget: float = 0.2
    heavy: float = 0.5
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.name, "every", self.every, 1)
        if not 0 <= self.heavy <= 1:
            raise UsageError(f"{self.name}: heavy={self.heavy} is outside [0, 1]; use for example heavy=0.5")

    @property
    def spare(self) -> int:
        return self.every - 1

    def observed(self, prompt: int) -> int:
        return prompt

    def score(self, attention: Tensor, kv_heads: int) -> Tensor:
        """The attention itself, the mean of the query heads that share a KV head."""
        return attention.unflatten(0, (kv_heads, -1)).mean(1)

    def keep(self, scores: Tensor, count: int) -> Tensor:
        length = torch.tensor([scores.shape[-1]], device=scores.device)
        return top_k(scores[None], count, length, recent=count - round(self.heavy * count))[0]
