"""How alike the attention of every target layer and every draft layer is, over sampled rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.samples import EPSILON, Geometry, RoundSample

NUCLEUS = 0.95
"""The mass of the target's nucleus that the metric ``recall`` looks for."""


def similarity(samples: Iterable[RoundSample], geometry: Geometry, metric: str = "kl") -> Tensor:
    """Similarity of each pair of layers, their attention averaged over heads; the mean over the rounds.

    Args:
        samples: the rounds; looked at one by one, so a generator will do.
        metric: a name in :data:`METRICS`.

    Returns:
        float32 ``[target_layers, draft_layers]`` on the CPU; larger is more alike.

    Raises:
        UsageError: if the metric is unknown or there is no round.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown similarity metric {metric!r}: choose one of {', '.join(METRICS)}")
    total = torch.zeros(geometry.target_layers, geometry.draft_layers, dtype=torch.float64)
    rounds = 0
    for sample in samples:
        total += METRICS[metric](geometry.layer_rows(sample), geometry.draft_layer_rows(sample)).cpu()
        rounds += 1
    if not rounds:
        raise UsageError("no rounds to compare the models on: calibrate on a longer text")
    return (total / rounds).float()


def negative_kl(target: Tensor, draft: Tensor) -> Tensor:
    """``-KL(target || draft)`` in nats; :data:`EPSILON` stands in for the draft's zeros."""
    self_information = torch.special.xlogy(target, target).sum(-1, keepdim=True)
    return target @ (draft + EPSILON).log().T - self_information


def negative_js(target: Tensor, draft: Tensor) -> Tensor:
    """Negative Jensen-Shannon divergence in nats, from ``-log 2`` (disjoint) to 0; zeros are no trouble."""
    target_entropy, draft_entropy = _entropy(target), _entropy(draft)
    columns = [
        (target_entropy + entropy) / 2 - _entropy((target + row) / 2)
        for row, entropy in zip(draft, draft_entropy, strict=True)
    ]
    return torch.stack(columns, dim=-1)


def nucleus_recall(target: Tensor, draft: Tensor) -> Tensor:
    """Share of the target's nucleus mass that the draft's k highest tokens hold, k the size of that nucleus.

    Ties go to the earlier token.
    """
    ranked, order = target.sort(dim=-1, descending=True, stable=True)
    # A token belongs to the nucleus if those before it fall short of the mass.
    inside = ranked.cumsum(-1) - ranked < NUCLEUS * ranked.sum(-1, keepdim=True)
    nucleus = torch.zeros_like(target).scatter_(-1, order, ranked * inside)
    last = inside.sum(-1, keepdim=True) - 1
    columns = [
        nucleus[:, preference].cumsum(-1).gather(-1, last)
        for preference in draft.argsort(dim=-1, descending=True, stable=True)
    ]
    return torch.cat(columns, dim=-1) / nucleus.sum(-1, keepdim=True)


def _entropy(rows: Tensor) -> Tensor:
    return -torch.special.xlogy(rows, rows).sum(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": negative_kl,
    "js": negative_js,
    "recall": nucleus_recall,
}
"""Similarities of distributions ``[T, L]`` and ``[D, L]``, as ``[T, D]``."""
