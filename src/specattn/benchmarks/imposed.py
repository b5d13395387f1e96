"""A nucleus of a wanted size: scores of which a given number hold the mass that is asked for.

Random weights say nothing of how concentrated attention is, so the share of the context that is read has to be imposed.
The kernel runs as ever, on scores that were made up beforehand instead of those of the draft: what it writes is what
verification reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.selection.base import Selection

NucleusLists = Callable[..., Selection]


def check_density(density: float, p: float) -> None:
    """Refuse a density for which no scores can be made.

    Raises:
        UsageError: it is no share, or too much is to be read for ``p`` to tell it from the rest.
    """
    if not 0 < density < 1:
        raise UsageError(
            f"density {density:g} must lie between 0 and 1: the share of the context that is read"
        )
    if 3 * density / (1 - density) * (1 - p) / p >= 1:
        raise UsageError(
            f"a density of {density:g} cannot be imposed with p={p:g}; lower the density, or raise the method's p"
        )


def imposed_nucleus(
    nucleus_lists: NucleusLists,
    *,
    lists: tuple[int, int],
    width: int,
    visible: int,
    density: float,
    p: float,
    sink: int,
    recent: int,
    dtype: torch.dtype,
    device: torch.device,
) -> NucleusLists:
    """``nucleus_lists`` that ignores the scores it is given for such with a nucleus of ``density * visible`` tokens.

    Args:
        lists: requests, and lists of each.
        width: of the scores' last dimension.
        sink, recent: tokens that are always in the lists; they count.
    """
    scores = torch.zeros(*lists, width, dtype=dtype, device=device)
    count = max(round(density * visible), sink + recent)
    for request in scores:  # one after the other: what making them takes is as large as they are
        request[:, :visible] = concentrated(lists[1], visible, count, p, sink, recent, device)

    def imposed(
        _: Tensor, p: float, lengths: Tensor, entries: Tensor | None = None, **options: Any
    ) -> Selection:
        return nucleus_lists(scores, p, lengths, **options)

    return imposed


def concentrated(
    rows: int, visible: int, count: int, p: float, sink: int, recent: int, device: torch.device
) -> Tensor:
    """Scores ``[rows, visible]`` whose top-p nucleus has ``count`` random positions, the forced ones among them."""
    order = torch.rand(rows, visible, device=device)
    order[:, :sink] = order[:, visible - recent :] = 2
    chosen = torch.zeros(rows, visible, dtype=torch.bool, device=device)
    chosen.scatter_(1, order.topk(count).indices, True)
    weights = torch.rand(rows, visible, device=device)
    kept = ((1 + weights) * chosen).sum(-1, keepdim=True)
    left = (weights * ~chosen).sum(-1, keepdim=True)
    # Each of the chosen weighs 1 or more. The mass p lies half of that below what they weigh together, so that none
    # can be spared and no other is needed.
    rest = (kept - 0.5) / p - kept
    return torch.where(chosen, 1 + weights, weights * rest / left)
