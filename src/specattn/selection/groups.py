"""How the query heads of a KV head agree on one list."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

POLICIES = ("mean", "max", "union")
"""``mean`` and ``max`` combine the group's scores and select once; ``union`` selects for every head and joins."""


def select_for_groups(
    weights: Tensor, kv_heads: int, policy: str, select: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply ``select`` to scores of query heads and return masks of KV heads.

    Args:
        weights: ``[..., query_heads, length]``.
        select: maps scores ``[..., heads, length]`` to a boolean mask of the same shape.

    Returns:
        boolean ``[..., kv_heads, length]``.
    """
    grouped = weights.unflatten(-2, (kv_heads, -1))
    if policy == "mean":
        return select(grouped.mean(-2))
    if policy == "max":
        return select(grouped.amax(-2))
    return select(weights).unflatten(-2, (kv_heads, -1)).any(-2)
