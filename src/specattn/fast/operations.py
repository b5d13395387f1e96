"""The operations of the fast path: Triton kernels on a GPU, their references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.selection.base import Selection


@dataclass(frozen=True)
class Operations:
    """What a round is made of, besides matrix products; each pair of kernel and reference has one signature.

    Attributes:
        scores: the dtype in which the draft's scores are kept.
    """

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_append: Callable[..., Tensor]
    gated: Callable[[Tensor], Tensor]
    export_attention: Callable[..., Tensor]
    head_mixture: Callable[..., Tensor]
    nucleus_lists: Callable[..., Selection]
    tail_lists: Callable[..., Selection]
    sparse_attention: Callable[..., Tensor]
    dense_attention: Callable[..., Tensor]
    scores: torch.dtype


def operations_for(device: torch.device) -> Operations:
    """Kernels where they run, references elsewhere."""
    return kernels() if device.type == "cuda" else references()


def kernels() -> Operations:
    """The Triton kernels."""
    from specattn.kernels.add_norm_triton import add_norm
    from specattn.kernels.export_attention import export_attention
    from specattn.kernels.gated_triton import gated
    from specattn.kernels.head_mixture import head_mixture
    from specattn.kernels.nucleus_lists import nucleus_lists
    from specattn.kernels.paged_attention import dense_paged_attention, sparse_paged_attention
    from specattn.kernels.rope_append_triton import rope_append
    from specattn.kernels.tail_lists import tail_lists

    return Operations(
        add_norm,
        rope_append,
        gated,
        export_attention,
        head_mixture,
        nucleus_lists,
        tail_lists,
        sparse_paged_attention,
        dense_paged_attention,
        torch.float16,
    )


def references() -> Operations:
    """Their PyTorch references."""
    from specattn.kernels.add_norm import add_norm
    from specattn.kernels.export_attention import export_attention_reference
    from specattn.kernels.gated import gated
    from specattn.kernels.head_mixture import head_mixture_reference
    from specattn.kernels.nucleus_lists_reference import nucleus_lists_reference
    from specattn.kernels.paged_reference import (
        dense_paged_attention_reference,
        sparse_paged_attention_reference,
    )
    from specattn.kernels.rope_append import rope_append
    from specattn.kernels.tail_lists_reference import tail_lists_reference

    return Operations(
        add_norm,
        rope_append,
        gated,
        export_attention_reference,
        head_mixture_reference,
        nucleus_lists_reference,
        tail_lists_reference,
        sparse_paged_attention_reference,
        dense_paged_attention_reference,
        torch.float32,
    )
