"""The operations of the fast path: Triton kernels on a GPU, their references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operations:
    """What a decoder layer is made of, besides matrix products and attention; the signatures are the references'."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_append: Callable[..., Tensor]
    gated: Callable[[Tensor], Tensor]


def operations_for(device: torch.device) -> Operations:
    """Kernels where they run, references elsewhere."""
    if device.type == "cuda":
        from specattn.kernels.add_norm_triton import add_norm
        from specattn.kernels.gated_triton import gated
        from specattn.kernels.rope_append_triton import rope_append
    else:
        from specattn.kernels.add_norm import add_norm
        from specattn.kernels.gated import gated
        from specattn.kernels.rope_append import rope_append
    return Operations(add_norm, rope_append, gated)
