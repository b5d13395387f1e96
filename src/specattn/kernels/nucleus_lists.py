"""Lists of the tokens in a nucleus, for all layers, heads and requests at once."""

from __future__ import annotations

from torch import Tensor

from specattn.kernels.nucleus import nucleus
from specattn.selection.base import Selection


def nucleus_lists_reference(
    weights: Tensor, p: float, lengths: Tensor, *, sink: int, recent: int, indices: Tensor, counts: Tensor
) -> None:
    found = Selection.from_mask(nucleus(weights, p, lengths, sink=sink, recent=recent))
    indices.copy_(found.indices)
    counts.copy_(found.counts)
