"""SnapKV (arXiv 2404.14469): the end of the prompt says which of the tokens before it are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from specattn.errors import UsageError
from specattn.kernels.nucleus import top_k
from specattn.selection.checks import check_at_least, check_choice
from specattn.selection.eviction import Evicting


@dataclass(frozen=True)
class SnapKV(Evicting):
    """Keeps the prompt's window, and the tokens before it that the window attends to, once; later tokens all stay.

    Attributes:
        budget: tokens of the prompt that stay, the window included: a fraction up to 1, a token count above.
        window: the prompt's last tokens, which are observed and always kept.
        kernel: tokens over which scores are pooled, odd, so that neighbours of heavy tokens stay with them.
        pooling: ``max`` or ``avg``.
        gqa: how a KV head's query heads agree, after the pooling: ``mean`` or ``max``.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    gqa: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.name, "window", self.window, 1)
        check_at_least(self.name, "kernel", self.kernel, 1)
        check_choice(self.name, "pooling", self.pooling, ("max", "avg"))
        check_choice(self.name, "gqa", self.gqa, ("mean", "max"))
        if self.kernel % 2 == 0:
            raise UsageError(f"{self.name}: kernel={self.kernel} is even; use for example kernel=7")
        if 1 < self.budget < self.window:
            raise UsageError(
                f"{self.name}: budget={self.budget:g} is below window={self.window}, which is always kept; "
                "use a larger budget or a smaller window"
            )

    def limit(self, context: int) -> int:
        """The budget, or the window where a fraction of the prompt is less."""
        return min(context, max(super().limit(context), self.window))

    def observed(self, prompt: int) -> int:
        return self.window if self.limit(prompt) < prompt else 0

    def score(self, attention: Tensor, kv_heads: int) -> Tensor:
        """The pooled attention ``[query_heads, length]`` of the window to what lies before it; 0 inside it."""
        before = attention[:, : -self.window]
        pool = max_pool1d if self.pooling == "max" else avg_pool1d
        pooled = pool(before, self.kernel, stride=1, padding=self.kernel // 2).unflatten(0, (kv_heads, -1))
        return pad(pooled.mean(1) if self.gqa == "mean" else pooled.amax(1), (0, self.window))

    def keep(self, scores: Tensor, count: int) -> Tensor:
        length = torch.tensor([scores.shape[-1]], device=scores.device)
        return top_k(scores[None], count, length, recent=self.window)[0]
