"""What a pilot sample of the residual tells about the terms of softmax's numerator and denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.selection.base import LayerState, Selection


@dataclass(frozen=True)
class RelativeSpread:
    """How uncertain the two sums would be if a single draw estimated their residual part.

    ``n s / |S|`` for ``n`` residual tokens, the standard deviation ``s`` of their terms and the whole sum ``S``, heavy
    tokens included. The terms of the numerator are vectors: ``s`` is the root of their covariance's trace, ``|S|`` the
    Euclidean norm.

    Attributes:
        numerator, denominator: float32 ``[batch, kv_heads, group, rows]``, one for each query.
    """

    numerator: Tensor
    denominator: Tensor


def relative_spread(state: LayerState, exact: Selection, pilot: Selection, size: Tensor) -> RelativeSpread:
    """Estimate the spread for every query of a layer.

    Args:
        exact: the heavy tokens, the round's own among them.
        pilot: a uniform sample without replacement of the others, all visible to every row.
        size: integer ``[batch, kv_heads]``, how many others there are.
    """
    exact_logits, exact_values = read_logits(state, exact)
    logits, values = read_logits(state, pilot)
    # Every row sees itself, so the maximum is finite; it cancels in the ratios.
    peak = torch.maximum(exact_logits.amax(-1), logits.amax(-1))[..., None]
    heavy, weights = (exact_logits - peak).exp(), (logits - peak).exp()
    size, count = (number[:, :, None, None].float() for number in (size, pilot.counts))
    scale = size / count.clamp(min=1)

    drawn = weights.sum(-1)
    denominator = heavy.sum(-1) + scale * drawn
    variance = _variance(weights.square().sum(-1), drawn.square(), count)

    drawn = weights @ values[:, :, None]
    numerator = heavy @ exact_values[:, :, None] + scale[..., None] * drawn
    squares = weights.square() @ values.square().sum(-1)[:, :, None, :, None]
    trace = _variance(squares[..., 0], drawn.square().sum(-1), count)
    # The pilot's own noise lengthens the estimated numerator, most where the values cancel.
    noise = size * (scale - 1) * trace
    length = (numerator.square().sum(-1) - noise).clamp(min=0).sqrt()
    return RelativeSpread(_ratio(size * trace.sqrt(), length), _ratio(size * variance.sqrt(), denominator))


def _variance(squares: Tensor, squared_sum: Tensor, count: Tensor) -> Tensor:
    """The sample variance of ``count`` terms from the sum of their squares and the square of their sum."""
    return ((squares - squared_sum / count.clamp(min=1)) / (count - 1).clamp(min=1)).clamp(min=0)


def read_logits(state: LayerState, selection: Selection) -> tuple[Tensor, Tensor]:
    """Logits ``[batch, kv_heads, group, rows, n]``, -inf where a row does not see a token, and values, float32."""
    info = state.round
    keys, values = state.source.gather(state.layer, selection.indices)
    queries = state.queries.float().unflatten(2, (info.kv_heads, -1)).permute(0, 2, 3, 1, 4)
    logits = queries @ keys.float().transpose(-1, -2)[:, :, None] * state.scaling
    position = info.starts[:, None] + torch.arange(info.rows, device=info.starts.device)
    indices = selection.indices[:, :, None, None]
    visible = (indices >= 0) & (indices <= position[:, None, None, :, None])
    return logits.masked_fill(~visible, float("-inf")), values.float()


def _ratio(spread: Tensor, total: Tensor) -> Tensor:
    """``spread / total``; nothing is uncertain where nothing is spread."""
    return torch.where(spread > 0, spread / total, 0.0)
