"""The operations of the fast path: Triton kernels on a GPU, their references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.normed_rows import NormedRows
from specattn.selection.base import Selection

if TYPE_CHECKING:
    from specattn.kernels.schedule import Schedule

ATTENTIONS = ("triton", "flashinfer")
"""What the target can attend with on a GPU."""


@dataclass(frozen=True)
class Operations:
    """What a round is made of, besides products of many rows; each pair of kernel and reference has one signature.

    Attributes:
        scores: the dtype in which the draft's logits are kept.
        probabilities: the dtype of attention that lists are made from.
        captured: whether a CUDA graph can hold them: none asks the host for anything.
    """

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_append: Callable[..., Tensor]
    gated: Callable[[Tensor], Tensor]
    norm_linear: Callable[..., Tensor]
    norm_gated_linear: Callable[..., Tensor]
    norm_rope_linear: Callable[..., Tensor]
    linear_add: Callable[..., tuple[Tensor, NormedRows]]
    export_attention: Callable[..., Tensor]
    head_mixture: Callable[..., Tensor]
    echoes: Callable[..., Tensor]
    nucleus_lists: Callable[..., Selection]
    tail_lists: Callable[..., Selection]
    rate_lists: Callable[..., Selection]
    sparse_attention: Callable[..., Tensor]
    dense_attention: Callable[..., Tensor]
    schedule: Callable[..., Schedule | None]
    round_scores: Callable[..., None]
    quantised_round_scores: Callable[..., None]
    scores: torch.dtype
    probabilities: torch.dtype
    captured: bool = True


def operations_for(device: torch.device, attention: str = "triton") -> Operations:
    """Kernels where they run, references elsewhere.

    Args:
        attention: one of :data:`ATTENTIONS`. FlashInfer is there to be compared with: its launches are planned on the
            host, so rounds are not captured.

    Raises:
        UsageError: an unknown name, or FlashInfer where it cannot run.
    """
    if attention not in ATTENTIONS:
        raise UsageError(f"attention={attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}")
    if attention == "triton":
        return kernels() if device.type == "cuda" else references()
    if device.type != "cuda":
        raise UsageError(f"attention=flashinfer needs a CUDA GPU, not {device}; use attention=triton")
    return with_flashinfer(kernels(), device)


def with_flashinfer(operations: Operations, device: torch.device) -> Operations:
    """The same with FlashInfer's attention in the target's passes; the draft's exports its scores and stays ours.

    Raises:
        UsageError: FlashInfer is not installed.
    """
    from specattn.kernels.flashinfer_attention import FlashInferAttention

    attention = FlashInferAttention(device)
    return replace(
        operations,
        sparse_attention=attention.sparse,
        dense_attention=attention.dense,
        captured=False,
    )


def kernels() -> Operations:
    """The Triton kernels."""
    from specattn.kernels.add_norm_triton import add_norm
    from specattn.kernels.echoes_triton import echoes
    from specattn.kernels.export_attention import export_attention
    from specattn.kernels.gated_triton import gated
    from specattn.kernels.head_mixture import head_mixture
    from specattn.kernels.linear_add_triton import linear_add
    from specattn.kernels.norm_linear_triton import norm_gated_linear, norm_linear
    from specattn.kernels.norm_rope_linear_triton import norm_rope_linear
    from specattn.kernels.nucleus_lists import nucleus_lists
    from specattn.kernels.paged_attention import dense_paged_attention, sparse_paged_attention
    from specattn.kernels.quantised_round_scores import quantised_round_scores
    from specattn.kernels.rate_lists import rate_lists
    from specattn.kernels.rope_append_triton import rope_append
    from specattn.kernels.round_scores import round_scores
    from specattn.kernels.schedule import schedule
    from specattn.kernels.tail_lists import tail_lists

    return Operations(
        add_norm,
        rope_append,
        gated,
        norm_linear,
        norm_gated_linear,
        norm_rope_linear,
        linear_add,
        export_attention,
        head_mixture,
        echoes,
        nucleus_lists,
        tail_lists,
        rate_lists,
        sparse_paged_attention,
        dense_paged_attention,
        schedule,
        round_scores,
        quantised_round_scores,
        torch.float16,
        torch.bfloat16,
    )


def references() -> Operations:
    """Their PyTorch references."""
    from specattn.kernels.add_norm import add_norm
    from specattn.kernels.echoes import echoes_reference
    from specattn.kernels.export_attention import export_attention_reference
    from specattn.kernels.gated import gated
    from specattn.kernels.head_mixture import head_mixture_reference
    from specattn.kernels.linear_add import linear_add
    from specattn.kernels.norm_linear import norm_gated_linear, norm_linear, norm_rope_linear
    from specattn.kernels.nucleus_lists_reference import nucleus_lists_reference
    from specattn.kernels.paged_reference import (
        dense_paged_attention_reference,
        no_schedule,
        sparse_paged_attention_reference,
    )
    from specattn.kernels.quantised_round_scores import quantised_round_scores_reference
    from specattn.kernels.rate_lists_reference import rate_lists_reference
    from specattn.kernels.rope_append import rope_append
    from specattn.kernels.round_scores import round_scores_reference
    from specattn.kernels.tail_lists_reference import tail_lists_reference

    return Operations(
        add_norm,
        rope_append,
        gated,
        norm_linear,
        norm_gated_linear,
        norm_rope_linear,
        linear_add,
        export_attention_reference,
        head_mixture_reference,
        echoes_reference,
        nucleus_lists_reference,
        tail_lists_reference,
        rate_lists_reference,
        sparse_paged_attention_reference,
        dense_paged_attention_reference,
        no_schedule,
        round_scores_reference,
        quantised_round_scores_reference,
        torch.float32,
        torch.float32,
    )
