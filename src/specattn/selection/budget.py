"""Budgets: a fraction of the context up to 1, a token count above."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specattn.errors import UsageError


def check_budget(method: str, budget: float, option: str = "budget") -> None:
    """Refuse a budget that is neither a fraction nor a count."""
    if not 0 < budget < math.inf or (budget > 1 and budget != int(budget)):
        raise UsageError(
            f"{method}: {option}={budget} is neither a fraction in (0, 1] nor a whole number of tokens above 1"
        )


def budget_tokens(budget: float, context: Tensor) -> Tensor:
    """Tokens that ``budget`` allows for contexts of ``context`` tokens, int64, at most the context."""
    wanted = torch.ceil(context * budget) if budget <= 1 else torch.full_like(context, int(budget))
    return torch.minimum(wanted.long(), context.long())


def check_extent(method: str, option: str, extent: float) -> None:
    """Refuse a number of tokens that is neither a fraction nor a count."""
    if not (0 <= extent < 1 or (extent >= 1 and float(extent).is_integer())):
        raise UsageError(
            f"{method}: {option}={extent} is neither a fraction in [0, 1) nor a whole number of tokens from 1 on"
        )


def extent_tokens(extent: float, context: Tensor) -> Tensor:
    """Tokens that ``extent`` stands for, int64: a fraction of ``context`` below 1, a count from 1 on."""
    return (torch.ceil(context * extent) if extent < 1 else torch.full_like(context, int(extent))).long()
