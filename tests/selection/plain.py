"""Selections read back as sets, and definitions computed in the plainest way."""

from __future__ import annotations

from torch import Tensor

from specattn.selection.base import Selection


def listed(selection: Selection, request: int, head: int) -> set[int]:
    """The tokens that one KV head of one request reads."""
    return set(selection.indices[request, head, : int(selection.counts[request, head])].tolist())


def smallest_nucleus(weights: Tensor, p: float, forced: set[int]) -> set[int]:
    """By sorting: the forced positions, then the heaviest until the mass is p of all."""
    total = float(weights.double().sum())
    chosen = set(forced)
    mass = sum(float(weights[i]) for i in forced)
    for i in weights.argsort(descending=True).tolist():
        if mass >= p * total * (1 - 1e-6):
            break
        if i not in chosen:
            chosen.add(i)
            mass += float(weights[i])
    return chosen
