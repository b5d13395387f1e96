"""Lists in which some tokens stand for others: the unbiased estimators of Horvitz, Thompson, Hansen and Hurwitz."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specattn.selection.base import Selection


def weighted_list(exact: Tensor, times: Tensor, expected: Tensor) -> Selection:
    """The tokens of ``exact`` with weight 1, and the sampled ones with weight ``times / expected``.

    Over repeated samples, ``times`` is ``expected`` on average, so that each token has the weight 1 on average, and a
    sum over all tokens is estimated without bias: softmax's numerator, and its denominator. The logarithm of the
    weight, added to a token's logit, multiplies both.

    Args:
        exact: boolean ``[batch, kv_heads, length]``.
        times: integer ``[batch, kv_heads, length]``, how often each token was drawn; only others than ``exact``.
        expected: how often it is drawn on average, above 0 where ``times`` is; broadcastable to ``times``.
    """
    selection = Selection.from_mask(exact | (times > 0))
    # Two logarithms, not that of the ratio: where both numbers are 1 the weight is 1 exactly.
    weights = times.clamp(min=1).double().log() - expected.double().log()
    weights = torch.where(times > 0, weights, 0.0).float()
    listed = weights.gather(-1, selection.indices.clamp(min=0).long())
    return replace(selection, log_weights=torch.where(selection.indices < 0, 0.0, listed))
