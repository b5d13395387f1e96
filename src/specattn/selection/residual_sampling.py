"""Uniform samples of the tokens that no heavy-hitter selector asked for: the residual.

A sample says how often each token was drawn. On average that is ``count / size`` times, where ``size`` tokens are
residual: what :func:`specattn.selection.weighted_lists.weighted_list` divides by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.nucleus import top_k
from specattn.selection.base import Selection


def without_replacement(residual: Tensor, count: Tensor, numbers: Tensor) -> Tensor:
    """Draw ``count`` different tokens of each residual, every set of that size with the same probability.

    Args:
        residual: boolean ``[batch, kv_heads, length]``.
        count: integer ``[batch, kv_heads]``, at most the tokens of the residual.
        numbers: uniform in [0, 1), ``[batch, kv_heads, length]``.

    Returns:
        int32 ``[batch, kv_heads, length]``: 1 where a token was drawn.
    """
    # 1 - u is above 0 for every u, so the residual ranks before the rest.
    rank = torch.where(residual, 1 - numbers, 0.0)
    lengths = torch.full_like(residual[:, 0, 0], residual.shape[-1], dtype=torch.int64)
    return top_k(rank, count, lengths).int()


def with_replacement(residual: Tensor, count: Tensor, numbers: Tensor) -> Tensor:
    """Draw ``count`` tokens of each residual one after the other, each time from all of them.

    Where ``count`` reaches the size of the residual, its tokens are taken once each instead: no more is read, and
    nothing is left to chance. Arguments and result as in :func:`without_replacement`; a token may be drawn often.
    """
    listed = Selection.from_mask(residual)
    place = (numbers.double() * listed.counts[..., None]).long()
    token = listed.indices.gather(-1, place).clamp(min=0).long()
    draw = torch.arange(residual.shape[-1], device=residual.device)
    drawn = (draw < count[..., None]).int()
    times = torch.zeros_like(drawn).scatter_add_(-1, token, drawn)
    return torch.where((count >= listed.counts)[..., None], residual.int(), times)
