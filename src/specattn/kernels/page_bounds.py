"""Bounds of a page's keys: the least and the greatest value of each channel, for Quest's page scores.

Quest (arXiv 2406.10774) bounds ``q . k`` over a page by ``sum_c max(q_c lower_c, q_c upper_c)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_power_of_two, check_shape


@dataclass(frozen=True)
class PageBounds:
    """One layer's bounds, an entry for each page of the pool.

    Attributes:
        lower, upper: ``[pages, kv_heads, head_dim]``, in the keys' dtype.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def empty(cls, pool: Tensor, page_size: int) -> PageBounds:
        """Bounds without content for a ``pool`` of keys ``[pool_rows, kv_heads, head_dim]``."""
        pages = pool.shape[0] // page_size
        return cls(pool.new_empty(pages, *pool.shape[1:]), pool.new_empty(pages, *pool.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes that the bounds occupy."""
        return self.lower.nbytes + self.upper.nbytes


def update_page_bounds(keys: Tensor, bounds: PageBounds, batch: PagedBatch, appended: int) -> None:
    """Compute the bounds of all pages anew that hold one of the last ``appended`` tokens of a request.

    They come from the keys in the pool up to the request's length. So a token that was rejected leaves no trace: the
    append that follows a rollback begins where the kept tokens end, and the page of its first token is among those
    that are computed anew.

    Args:
        keys: the pool, ``[pool_rows, kv_heads, head_dim]``, with the new keys.
        bounds: written at the touched pages.
        batch: where the tokens lie; ``lengths`` count the new ones.
        appended: tokens that each request has just got, at most its length.

    Raises:
        UsageError: shapes that do not fit together, sizes that are no powers of two.
    """
    from specattn.kernels.page_bounds_triton import page_bounds_kernel

    _check(keys, bounds, batch, appended)
    kv_heads, head_dim = keys.shape[1:]
    grid = (kv_heads, _touched(appended, batch.page_size), len(batch))
    page_bounds_kernel[grid](
        keys,
        bounds.lower,
        bounds.upper,
        batch.block_table,
        batch.slots,
        batch.lengths,
        appended,
        keys.stride(0),
        batch.block_table.stride(0),
        D=head_dim,
        PAGE=batch.page_size,
    )


def update_page_bounds_reference(keys: Tensor, bounds: PageBounds, batch: PagedBatch, appended: int) -> None:
    """The same in PyTorch, page by page."""
    _check(keys, bounds, batch, appended)
    size = batch.page_size
    for request, length in enumerate(batch.lengths.tolist()):
        first = max(0, length - appended) // size
        for page in range(first, -(-length // size)):
            tokens = torch.arange(page * size, min(length, (page + 1) * size), device=keys.device)
            rows = batch.rows(request, tokens)
            bounds.lower[rows[0] // size], bounds.upper[rows[0] // size] = (
                keys[rows].amin(0),
                keys[rows].amax(0),
            )


def _touched(appended: int, page_size: int) -> int:
    """The most pages that ``appended`` tokens can lie in."""
    return (appended + page_size - 2) // page_size + 1


def _check(keys: Tensor, bounds: PageBounds, batch: PagedBatch, appended: int) -> None:
    check_power_of_two("page_size", batch.page_size)
    check_power_of_two("head_dim", keys.shape[-1])
    pages, *heads = keys.shape[0] // batch.page_size, *keys.shape[1:]
    check_shape("lower", bounds.lower, pages, *heads)
    check_shape("upper", bounds.upper, pages, *heads)
    if appended < 1:
        raise UsageError(f"appended={appended} is below 1: no page has changed")
    if not keys.is_contiguous():
        raise UsageError("keys must be a contiguous pool; pass the cache's own tensor")
