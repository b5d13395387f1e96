"""Two signals: what the draft attends to now, and what the target attended to when it last read everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.errors import UsageError
from specattn.mapping.artifact import Mapping
from specattn.selection.base import RoundState
from specattn.selection.checks import check_at_least, check_choice

if TYPE_CHECKING:
    from specattn.selection.specattn import SpecAttn

WEIGHT, HALF_LIFE = 0.5, 256.0
"""For mappings that were calibrated before these were: the weight of fresh scores, and tokens until it has halved."""


def joined(draft: Tensor, state: RoundState) -> Tensor:
    """The draft's rows ``[batch, rows, layers, kv_heads, length]`` joined with the target's stored scores.

    Tokens that the scores know get ``(1 - w) draft + w m scores``, where ``m`` is the draft's mass on them and the
    scores sum to 1; newer tokens keep what the draft says. So each row keeps its sum. The weight ``w`` of a layer
    falls with the scores' age: ``weight * 2 ** (-age / half_life)``, see :mod:`specattn.mapping.signals`.
    """
    scores, mapping = state.scores, state.mapping
    assert scores is not None and mapping is not None
    length = draft.shape[-1]
    known = torch.arange(length, device=draft.device) < scores.positions.view(-1, 1, 1, 1, 1)
    target = scores.probabilities.to(draft.dtype)[:, None]
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    target = pad(target, (0, length - target.shape[-1]))
    weight = signal_weight(mapping, state.starts - scores.positions)[:, None, :, None, None].to(draft.dtype)
    mass = torch.where(known, draft, 0).sum(-1, keepdim=True)
    return torch.where(known, torch.lerp(draft, mass * target, weight), draft)


def signal_weight(mapping: Mapping, age: Tensor) -> Tensor:
    """The weight of scores that are ``age`` ``[...]`` tokens old, in each layer: float32 ``[..., layers]``."""
    layers = mapping.metadata.geometry.target_layers
    weight, half_life = mapping.signal_weight, mapping.signal_half_life
    if weight is None or half_life is None:
        weight, half_life = (torch.full((layers,), value, device=age.device) for value in (WEIGHT, HALF_LIFE))
    return weight * torch.exp2(-age[..., None].float() / half_life)


def check_signals(method: SpecAttn) -> None:
    """Refuse two signals for a map whose predictions are not those of KV heads, and what only two signals use."""
    name = method.name
    check_choice(name, "signals", method.signals, ("draft", "both"))
    check_at_least(name, "refresh", method.refresh, 0)
    if method.signals == "both" and (method.map == "layer" or method.gqa != "mean"):
        raise UsageError(
            f"{name}: signals=both joins scores of KV heads, and map={method.map} with gqa={method.gqa} makes none; "
            "use map=heads or map=global with gqa=mean"
        )
    if method.refresh and method.signals != "both":
        raise UsageError(
            f"{name}: refresh={method.refresh} takes scores that only signals=both uses; add it, or leave refresh out"
        )
