"""SpargeAttn in the place of ``scaled_dot_product_attention``, for diffusion transformers and the like."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.prefill.thresholds import LAM, TAU, THETA, Thresholds, check_thresholds
from specattn.prefill.two_stage import check_head_dim, two_stage_attention

_NAME = "sparge_attention"


@overload
def sparge_attention(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, return_sparsity: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def sparge_attention(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> Tensor: ...
def sparge_attention(  # type: ignore[misc]  # the overloads pass the arguments on unnamed
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    theta: float = THETA,
    tau: float = TAU,
    lam: float = LAM,
    int8: bool = True,
    return_sparsity: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Approximate attention that leaves out blocks (SpargeAttn, arXiv 2502.18137), for inference.

    Takes what ``torch.nn.functional.scaled_dot_product_attention`` takes, but no mask and no dropout. Tokens that
    are alike should lie side by side: see :func:`specattn.hilbert_permutation`.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        key, value: ``[batch, kv_heads, length, head_dim]``; ``kv_heads`` divides ``heads``, whatever ``enable_gqa``.
        attn_mask, dropout_p: here so that calls need no change; must be ``None`` and 0.
        is_causal: row r sees the keys up to r; there must be as many keys as rows.
        scale: factor of the logits; ``head_dim ** -0.5`` if ``None``.
        theta, tau, lam, int8: see :class:`specattn.prefill.sparge.Sparge`.
        return_sparsity: say how much was left out.

    Returns:
        ``[batch, heads, rows, head_dim]`` in the value's dtype; with ``return_sparsity`` also the share of both matrix
        products, queries with keys and weights with values, that was left out, ``[batch, heads]``.

    Raises:
        UsageError: for a mask, dropout, gradients, a threshold out of range, or shapes that do not fit.
    """
    check_thresholds(_NAME, theta, tau, lam)
    _check_exact(attn_mask, dropout_p, query, key, value)
    _check_shapes(query, key, value, is_causal)
    result = two_stage_attention(
        query,
        key,
        value,
        Thresholds.uniform(theta, tau, lam, query.shape[1], query.device),
        start=0 if is_causal else None,
        scaling=query.shape[-1] ** -0.5 if scale is None else scale,
        int8=int8,
    )
    return (result.out, result.sparsity) if return_sparsity else result.out


def _check_exact(attn_mask: Tensor | None, dropout_p: float, *tensors: Tensor) -> None:
    if attn_mask is not None:
        raise UsageError(
            f"{_NAME} takes no attn_mask; leave padding out of the sequence, or use is_causal=True for a causal mask"
        )
    if dropout_p:
        raise UsageError(f"{_NAME}: dropout_p={dropout_p} must be 0; it is for inference")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise UsageError(f"{_NAME} has no gradients; call it inside torch.no_grad()")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise UsageError(
            f"{_NAME} needs [batch, heads, length, head_dim], keys and values alike, not {shapes}"
        )
    batch, heads, rows, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or heads % key.shape[1]:
        raise UsageError(f"{_NAME}: batch, head_dim and heads do not fit each other in {shapes}")
    if is_causal and rows != key.shape[2]:
        raise UsageError(f"{_NAME}: is_causal needs as many keys as rows, not {shapes}")
    check_head_dim(_NAME, head_dim)
