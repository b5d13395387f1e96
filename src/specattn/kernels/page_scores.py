"""Quest's estimate of what a page's keys are worth to a query (arXiv 2406.10774, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import has_kernels
from specattn.kernels.paged import check_shape
from specattn.kernels.split_kv import LARGEST_BLOCK, block_rows

MOST_CHANNELS = 256
BLOCK = 64
"""Pages that one program scores."""


def page_scores(
    query: Tensor, lower: Tensor, upper: Tensor, entries: Tensor, filled: Tensor, scaling: float
) -> Tensor:
    """``sum_c max(q_c lower_c, q_c upper_c)``, scaled like the attention's logits: no key of the page exceeds it.

    Whichever product is the larger depends on the channel's sign in the query alone, so it is two matrix products:
    the positive part of the query with ``upper`` and the negative part with ``lower``. The rows of the round and the
    query heads of a group share a tile, so each bound is read once.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.
        lower, upper: ``[stored pages, kv_heads, head_dim]``, the channels' extremes in each page, in the query's dtype;
            with the same strides, the channels contiguous.
        entries: integer ``[batch, pages]``, where the bounds of a request's pages lie.
        filled: integer ``[batch]``, how many of a request's pages are scored.
        scaling: factor of the logits.

    Returns:
        float32 ``[batch, kv_heads, rows, group, pages]``, minus infinity from ``filled`` on.

    Raises:
        UsageError: shapes, dtypes or strides that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.page_scores_triton import page_scores_kernel

    _check(query, lower, upper, entries, filled)
    batch, rows, query_heads, head_dim = query.shape
    kv_heads, pages = lower.shape[1], entries.shape[1]
    group = query_heads // kv_heads
    out = torch.empty(batch, kv_heads, rows, group, pages, device=query.device)
    page_scores_kernel[(-(-pages // BLOCK), kv_heads, batch)](
        query,
        lower,
        upper,
        entries,
        filled,
        out,
        scaling,
        pages,
        *query.stride()[:3],
        *lower.stride()[:2],
        entries.stride(0),
        ROWS=rows,
        GROUP=group,
        D=head_dim,
        BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
        BLOCK_M=block_rows(rows, query_heads, kv_heads),
        BLOCK_N=BLOCK,
        num_warps=4,
    )
    return out


def page_scores_reference(
    query: Tensor, lower: Tensor, upper: Tensor, entries: Tensor, filled: Tensor, scaling: float
) -> Tensor:
    """The same in float32 PyTorch."""
    grouped = query.float().unflatten(2, (lower.shape[1], -1)).permute(0, 2, 1, 3, 4)
    low, high = (bound[entries].float().permute(0, 2, 3, 1)[:, :, None] for bound in (lower, upper))
    scores = (grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low) * scaling
    scored = torch.arange(entries.shape[1], device=entries.device) < filled.view(-1, 1, 1, 1, 1)
    return scores.masked_fill(~scored, -torch.inf)


def runs_on(query: Tensor, kv_heads: int) -> bool:
    """Whether the kernel runs where ``query`` ``[batch, rows, query_heads, head_dim]`` is, and takes it."""
    _, rows, query_heads, head_dim = query.shape
    fits = rows * query_heads // kv_heads <= LARGEST_BLOCK and head_dim <= MOST_CHANNELS
    return fits and has_kernels(query.device)


def _check(query: Tensor, lower: Tensor, upper: Tensor, entries: Tensor, filled: Tensor) -> None:
    batch, _, _, head_dim = query.shape
    if head_dim > MOST_CHANNELS:
        raise UsageError(f"head_dim={head_dim}: the kernel takes up to {MOST_CHANNELS} channels")
    check_shape("lower", lower, None, None, head_dim)
    check_shape("upper", upper, *lower.shape)
    check_shape("entries", entries, batch, None)
    check_shape("filled", filled, batch)
    if not query.dtype == lower.dtype == upper.dtype:
        raise UsageError(f"the query is {query.dtype}, its pages' bounds {lower.dtype} and {upper.dtype}")
    strides = lower.stride(), upper.stride()
    if strides[0] != strides[1] or not query.stride(3) == lower.stride(2) == entries.stride(1) == 1:
        raise UsageError(
            f"bounds have strides {strides[0]} and {strides[1]}: both must be alike, and the channels of "
            "queries and bounds contiguous, as must a request's entries"
        )
