"""Methods that drop tokens for good: the contract between what they decide and :mod:`specattn.eviction`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.prefill.base import PrefillMethod
from specattn.selection.base import Method
from specattn.selection.budget import budget_tokens, check_budget


@dataclass(frozen=True)
class Evicting(Method):
    """A method that keeps ``budget`` tokens in every layer and KV head, and gives the memory of the others back.

    Decoding reads all that is left, in every layer. What stays is decided by the attention that tokens have got.

    Attributes:
        budget: tokens that stay: a fraction of the context up to 1, a token count above.
        dense_layers: always 0, since a layer that kept more would hold all others' memory.
    """

    selects: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    """Whether scores add up over the rows of the prompt and of every round, and tokens go on being dropped.

    Otherwise tokens are dropped once, at the end of the prompt.
    """

    dense_layers: int = 0
    budget: float = 0.1

    def __post_init__(self) -> None:
        if self.dense_layers != 0:
            raise UsageError(
                f"{self.name}: dense_layers={self.dense_layers} cannot be kept, tokens are dropped in every layer; "
                "leave it out"
            )
        check_budget(self.name, self.budget)

    def is_dense(self, layer: int) -> bool:
        return True

    def observed(self, prompt: int) -> int:
        """How many of the last tokens of a prompt must be scored; 0 if all of the prompt is kept."""
        raise NotImplementedError

    def score(self, attention: Tensor, kv_heads: int) -> Tensor:
        """What the attention ``[query_heads, ..., length]`` that tokens get is worth: ``[kv_heads, ..., length]``."""
        raise NotImplementedError

    def keep(self, scores: Tensor, count: int) -> Tensor:
        """Which ``count`` tokens stay: bool like ``scores`` ``[kv_heads, length]``, as many in every head."""
        raise NotImplementedError

    def limit(self, context: int) -> int:
        """Tokens that stay of a context of ``context`` tokens."""
        return int(budget_tokens(self.budget, torch.tensor(context)))

    @property
    def spare(self) -> int:
        """Tokens above the limit that a round may leave."""
        return 0


def check_prefill(method: Method, prefill: PrefillMethod) -> None:
    """Refuse a sparse prefill for a method that must see the attention of the whole prompt.

    Raises:
        UsageError: naming both.
    """
    if isinstance(method, Evicting) and method.accumulates and prefill.name != "dense":
        raise UsageError(
            f"method {method.name!r} adds up the attention of the whole prompt, and prefill {prefill.name!r} leaves "
            "most of it out; use the dense prefill, or a method that looks at the prompt's end only: snapkv"
        )
