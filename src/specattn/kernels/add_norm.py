"""Residual sum and RMS normalisation in one pass over the rows: what stands between two products of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of ``x`` and ``residual``, and its RMS norm scaled by ``weight`` (as transformers computes it).

    Args:
        x, residual: ``[rows, hidden]``.
        weight: ``[hidden]``.

    Returns:
        the normalised rows and the sum, both ``[rows, hidden]`` in the dtype of ``x``.
    """
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), total
