"""The paper's layer map: each target layer looks at one draft layer, deeper ones never at a shallower one."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError


def monotone_map(similarity: Tensor) -> Tensor:
    """The non-decreasing map of target to draft layers with the largest total similarity (arXiv 2510.27641).

    One draft layer may serve many target layers. Of equally good maps it is the lexicographically smallest.

    Args:
        similarity: ``[target_layers, draft_layers]``, finite.

    Returns:
        int64 ``[target_layers]`` on the CPU.

    Raises:
        UsageError: if ``similarity`` is no such matrix.
    """
    if similarity.dim() != 2 or not similarity.numel() or not similarity.isfinite().all():
        bad = int((~similarity.isfinite()).sum())
        raise UsageError(
            f"a layer map needs a finite similarity [target layers, draft layers], not one of shape "
            f"{list(similarity.shape)} with {bad} non-finite values: calibrate again"
        )
    rows = similarity.cpu().double()
    later = torch.zeros_like(rows[0])
    # totals[j][i]: the best total of layers j and up, if layer j maps to draft layer i.
    totals: list[list[float]] = []
    for row in rows.flip(0):
        total = row + later
        later = total.flip(0).cummax(0).values.flip(0)
        totals.insert(0, total.tolist())
    return torch.tensor(_first_best_path(totals))


def _first_best_path(totals: list[list[float]]) -> list[int]:
    path: list[int] = []
    for total in totals:
        start = path[-1] if path else 0
        path.append(total.index(max(total[start:]), start))
    return path
