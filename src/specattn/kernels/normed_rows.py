"""Rows on their way through an RMS norm: from the product before it to the one that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK = 0.0625
"""Of rows in float16: before a row is divided by its root mean square, its gain must not take it out of range."""


@dataclass(frozen=True)
class NormedRows:
    """Rows times the norm's gain, and what they are still to be divided by.

    A row's scale depends on all of it, and can as well be applied to the row's product. So who writes parts of rows
    leaves the squares of each part, and who multiplies them sums these up.

    Attributes:
        rows: ``[rows, channels]``; times :func:`shrinkage` as long as they have squares.
        squares: float32 ``[parts, rows]``, sums of squares of the rows without gain; ``None``: the rows are normalised.
        eps: of the norm.
    """

    rows: Tensor
    squares: Tensor | None = None
    eps: float = 0.0


def shrinkage(dtype: torch.dtype) -> float:
    """By what rows of ``dtype`` are multiplied until they are normalised."""
    return SHRINK if dtype == torch.float16 else 1.0
