"""The global set of draft heads: whole groups of query heads, because a group's scores cost one reading of its keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.mapping.mixture import fit_mixture
from specattn.mapping.samples import RoundSample, Targets


def groups_for(heads: int, size: int, available: int) -> int:
    """How many groups of ``size`` query heads come nearest to ``heads``, from one to the ``available`` ones."""
    return min(max(1, round(heads / size)), available)


def heaviest_groups(weights: Tensor, heads: Tensor, count: int, size: int) -> Tensor:
    """The heads of those ``count`` groups that mixtures use most.

    Args:
        weights: mixture weights ``[T, H]`` over ``heads``.
        heads: int64 ``[H]``, ascending numbers of whole groups' heads: head ``n`` is of group ``n // size``.
        count, size: of the groups.

    Returns:
        int64 ``[count * size]``, ascending; of groups with equal weight the lower.

    Raises:
        UsageError: if there are not ``count`` groups.
    """
    groups = heads.unflatten(0, (-1, size))
    if not 1 <= count <= len(groups):
        raise UsageError(
            f"{count} groups of draft heads cannot be chosen: give a number from 1 to {len(groups)}"
        )
    totals = weights.sum(0).unflatten(0, (-1, size)).sum(-1)
    ranked = totals.argsort(descending=True, stable=True)
    return groups[ranked[:count].sort().values].flatten()


def fit_groups(
    samples: Sequence[RoundSample],
    targets: Targets,
    weights: Tensor,
    *,
    groups: int,
    size: int,
    iterations: int = 100,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A set of whole groups, and mixtures over it alone.

    Backward elimination: the groups with the least weight go, at most half of those that are left, and the mixtures
    are fitted again, until there are ``groups``. In one step it would count how much a group is used while others can
    do its work; what matters is its use where they are gone.

    Args:
        samples, targets, iterations, progress: as in :func:`~specattn.mapping.mixture.fit_mixture`.
        weights: the mixtures ``[T, draft heads]`` over all heads.
        groups: how many are to be left.
        size: query heads a group.

    Returns:
        The set, int64 ascending ``[n]``, and the weights ``[T, n]`` and divergences ``[T]`` of its fit.

    Raises:
        UsageError: if there are not so many groups.
    """
    heads = torch.arange(weights.shape[-1], device=weights.device)
    left = len(heads) // size
    while True:
        left = max(groups, (left + 1) // 2)
        heads = heaviest_groups(weights, heads, left, size)
        weights, divergence = fit_mixture(
            samples, targets, heads=heads, iterations=iterations, progress=progress
        )
        if left == groups:
            return heads, weights, divergence
