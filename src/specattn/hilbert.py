"""The order of a grid's cells along a Hilbert curve: neighbours in the order are neighbours in the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specattn.errors import UsageError


def hilbert_permutation(
    shape: Sequence[int], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Reorder the tokens of an image or a video so that a block of them is a compact patch.

    Row-major order cuts a grid into stripes; along a Hilbert curve 64 tokens in a row are close to an 8 x 8 or a
    4 x 4 x 4 patch, more alike, and so more often worth one compressed token (SpargeAttn, arXiv 2502.18137, section
    3.7). Attention without a causal mask does not depend on the order of its tokens::

        order, inverse = hilbert_permutation((frames, height, width))
        out = attention(q[:, :, order], k[:, :, order], v[:, :, order])[:, :, inverse]

    The curve is that of the smallest cube whose side is a power of two; where the grid does not fill it, cells
    outside are passed over. In a cube of such a side, consecutive cells share a face.

    Args:
        shape: the grid's two or three sides, slowest first, of any length.

    Returns:
        ``order``, int64 ``[cells]``: the row-major number of each cell along the curve; and its inverse.

    Raises:
        UsageError: if the shape has not two or three sides of at least 1.
    """
    sides = tuple(int(side) for side in shape)
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise UsageError(
            f"a grid of shape {sides} has no Hilbert curve here; give two or three sides, each at least 1"
        )
    cells = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))
    order = _distance(cells.T, bits=max(1, (max(sides) - 1).bit_length())).argsort()
    return order, order.argsort()


def _distance(cells: Tensor, bits: int) -> Tensor:
    """How far along the curve each cell of ``cells`` ``[axes, n]`` lies, int64 ``[n]`` (Skilling 2004).

    Level by level, from the coarsest: a cell in the upper half of an axis has the axes below it mirrored, one in the
    lower half has them exchanged, so that every quadrant is entered where the one before was left. The Gray code of
    what remains numbers the quadrants of all levels.
    """
    axes = [axis.clone() for axis in cells]
    for level in reversed(range(1, bits)):
        below = (1 << level) - 1
        for axis in range(len(axes)):
            upper = (axes[axis] >> level & 1).bool()
            exchange = torch.where(upper, 0, (axes[0] ^ axes[axis]) & below)
            axes[axis] = axes[axis] ^ exchange
            axes[0] = axes[0] ^ torch.where(upper, below, exchange)
    for axis in range(1, len(axes)):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    flip = torch.zeros_like(axes[0])
    for level in reversed(range(1, bits)):
        flip ^= (axes[-1] >> level & 1) * ((1 << level) - 1)
    distance = torch.zeros_like(flip)
    for level in reversed(range(bits)):
        for axis in axes:
            distance = distance << 1 | ((axis ^ flip) >> level & 1)
    return distance
