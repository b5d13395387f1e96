"""A product and the residual sum that follows it: how a decoder layer writes to the residual stream."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from specattn.kernels.add_norm import add_norm
from specattn.kernels.normed_rows import NormedRows
from specattn.kernels.product_tiling import ProductWorkspace


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stream: Tensor,
    gain: Tensor,
    eps: float,
    workspace: ProductWorkspace | None = None,
) -> tuple[Tensor, NormedRows]:
    """Add ``x`` times ``weight`` to the stream, and begin the norm that reads it.

    Args:
        x: ``[rows, channels]``.
        weight: ``[outputs, channels]``.
        bias: ``[outputs]``.
        stream: ``[rows, outputs]``; stays as it is.
        gain: ``[outputs]``, the next norm's weight.
        eps: of that norm.
        workspace: for what a kernel shares among programs.

    Returns:
        the new stream ``[rows, outputs]``, and its rows on their way through the norm.
    """
    normed, total = add_norm(linear(x, weight, bias), stream, gain, eps)
    return total, NormedRows(normed)
