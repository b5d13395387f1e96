"""The product that follows an RMS norm: how a decoder layer reads the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from specattn.kernels.gated import gated
from specattn.kernels.normed_rows import NormedRows, shrinkage
from specattn.kernels.rope_append import rope_append


def norm_linear(normed: NormedRows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The normalised rows times ``weight``.

    Args:
        normed: of ``[rows, channels]``.
        weight: ``[outputs, channels]``.
        bias: ``[outputs]``.

    Returns:
        ``[rows, outputs]``.
    """
    return linear(_finished(normed), weight, bias)


def norm_gated_linear(normed: NormedRows, weight: Tensor) -> Tensor:
    """The same with the gate of a SwiGLU layer.

    Args:
        weight: ``[2 * width, channels]``, gates then values.

    Returns:
        ``[rows, width]``.
    """
    return gated(norm_linear(normed, weight))


def norm_rope_linear(
    normed: NormedRows,
    weight: Tensor,
    bias: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The product that gives queries, keys and values, and where these go.

    Args:
        weight, bias: of queries, keys and values, one below the other.
        cosine, sine, positions, rows, keys, values: see :func:`specattn.kernels.rope_append.rope_append`.

    Returns:
        queries ``[rows, query_heads, head_dim]``.
    """
    return rope_append(norm_linear(normed, weight, bias), cosine, sine, positions, rows, keys, values)


def _finished(normed: NormedRows) -> Tensor:
    if normed.squares is None:
        return normed.rows
    wide, channels = normed.rows.float(), normed.rows.shape[-1]
    scale = torch.rsqrt(normed.squares.sum(0) / channels + normed.eps) / shrinkage(normed.rows.dtype)
    return (wide * scale[:, None]).to(normed.rows.dtype)
