"""Head mixtures: each target head's attention predicted by a weighted mean of the draft heads' attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.samples import EPSILON, Geometry, RoundSample, Targets, normalised

GROWTH = 1.5
"""How fast the exponent of the EM update grows while the divergence falls. On real attention any value from
1.2 to 2 needs about a sixth of the passes of plain EM."""

TINY = torch.finfo(torch.float32).tiny


def fit_mixture(
    samples: Sequence[RoundSample],
    targets: Targets,
    *,
    heads: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights on the simplex that minimise the mean over rounds of ``KL(target || weights @ draft)``.

    The problem is convex. The EM update ``w <- w * g`` with ``g = E[target / mixture * draft]`` never raises
    the divergence. Here it is ``w * g ** step``: each target row grows its step while that still holds and
    sets it back to 1 when it does not (adaptive over-relaxation, Salakhutdinov and Roweis 2003). A step that
    would raise a row's divergence is not taken, so every row's divergence is non-increasing.

    Args:
        samples: the rounds; read once an iteration, each in two matrix products on its own device.
        targets: the distributions to predict, such as ``geometry.kv_rows``.
        heads: numbers of the draft heads to use; all of them by default.
        iterations: the most passes over the samples.
        tolerance: stop once two passes in a row lower the mean divergence by less than this share of it.
        progress: called after each pass with its number and the mean divergence.

    Returns:
        float32 weights ``[T, H]``, rows summing to one, and each row's mean divergence ``[T]`` in nats.

    Raises:
        UsageError: if there is no round, or ``iterations`` is below 1.
    """
    if not samples:
        raise UsageError("no rounds to fit a mixture to: calibrate on a longer text")
    if iterations < 1:
        raise UsageError(f"iterations={iterations} is below 1: a fit needs at least one pass over the rounds")
    weights = _uniform(samples[0], targets, heads)
    gradient, divergence = _expectation(samples, targets, weights, heads)
    step = weights.new_ones(len(weights))
    small_falls = 0
    for iteration in range(1, iterations + 1):
        mean = divergence.mean()
        if progress is not None:
            progress(iteration, mean.item())
        if iteration == iterations or small_falls == 2:
            break
        # In logarithms, because the powers overflow.
        trial = (weights.log() + step[:, None] * gradient.log()).softmax(-1)
        trial_gradient, trial_divergence = _expectation(samples, targets, trial, heads)
        better = trial_divergence <= divergence
        weights = torch.where(better[:, None], trial, weights)
        gradient = torch.where(better[:, None], trial_gradient, gradient)
        divergence = torch.where(better, trial_divergence, divergence)
        step = torch.where(better, step * GROWTH, 1.0)
        small_falls = small_falls + 1 if mean - divergence.mean() < tolerance * mean else 0
    return weights, divergence.float()


def mixture_divergence(
    samples: Sequence[RoundSample], targets: Targets, weights: Tensor, heads: Tensor | None = None
) -> Tensor:
    """Mean over the rounds of ``KL(target || weights @ draft)``, in nats: ``[T]`` for weights ``[T, H]``."""
    return _expectation(samples, targets, weights, heads)[1].float()


def layer_mixture(layer_map: Tensor, geometry: Geometry, rows: int) -> Tensor:
    """The layer map as mixture weights ``[target_layers * rows, draft heads]``: the mean of a layer's heads.

    ``rows`` is how many rows a target layer has: its KV heads or its query heads.
    """
    layers = torch.nn.functional.one_hot(layer_map, geometry.draft_layers).float() / geometry.draft_heads
    return layers.repeat_interleave(geometry.draft_heads, -1).repeat_interleave(rows, 0)


def _expectation(
    samples: Sequence[RoundSample], targets: Targets, weights: Tensor, heads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pass: ``E[target / mixture * draft]`` ``[T, H]`` and the mean divergence ``[T]`` of ``weights``."""
    gradient = torch.zeros_like(weights)
    divergence = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    for sample in samples:
        target, draft = targets(sample), _draft_rows(sample, heads)
        mixture = weights @ draft
        ratio = torch.div(target, mixture, out=mixture)
        gradient.addmm_(ratio, draft.T)
        # Where the target is zero any finite logarithm will do; ``xlogy`` takes three times as long.
        divergence += ratio.clamp_min_(TINY).log_().mul_(target).sum(-1)
    return gradient / len(samples), divergence / len(samples)


def _draft_rows(sample: RoundSample, heads: Tensor | None) -> Tensor:
    """``[H, L]``, positive. All rows have the same sum: EM is monotone only then."""
    rows = sample.draft if heads is None else sample.draft[heads]
    return normalised(rows).add_(EPSILON)


def _uniform(sample: RoundSample, targets: Targets, heads: Tensor | None) -> Tensor:
    count = sample.draft.shape[0] if heads is None else len(heads)
    rows = targets(sample).shape[0]
    return torch.full((rows, count), 1 / count, device=sample.draft.device)
