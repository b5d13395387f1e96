"""Centroids of what is not read: a page's other tokens, as one pseudo-token with the logarithm of their number."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.selection.base import LayerState, PseudoTokens, Selection
from specattn.stores.base import LARGEST_PAGE
from specattn.stores.page_means import PageMeans, PageMeansStore


def with_centroids(state: LayerState, selection: Selection, spec: PageMeans) -> Selection:
    """``selection`` with a pseudo-token for each page of ``spec.page`` tokens that is not read whole.

    Its key and value are the means of the page's unread tokens: the page's sum less the tokens of the list, which are
    read anyway. For n tokens with the mean key k and a query q, ``q k + log n`` is at most the logarithm of the
    attention that the n get together, by Jensen's inequality, and equals it where their logits agree.

    What it reads beside the list, both means of each page, is counted in ``extra_bytes``.
    """
    info, page = state.round, spec.page
    first = torch.arange(0, info.max_length, page, device=info.starts.device)
    held = (info.lengths[:, None] - first).clamp(0, page)  # [batch, pages]
    store = state.source.store(spec)
    assert isinstance(store, PageMeansStore)
    means = store.read(state.layer, state.source.rows(first.expand(len(held), -1)))
    # Unlisted entries land in one spare page, which is cut off again.
    number = torch.where(selection.indices < 0, len(first), selection.indices // page).long()
    read = torch.zeros(*number.shape[:2], len(first) + 1, device=held.device)
    read = read.scatter_add(2, number, torch.ones_like(number, dtype=read.dtype))[..., :-1]
    left = held[:, None] - read  # [batch, kv_heads, pages]
    keys, values = (
        _unread(mean, held, tokens, number, left)
        for mean, tokens in zip(means, state.source.gather(state.layer, selection.indices), strict=True)
    )
    page_bytes = sum(mean[0, 0].numel() * mean.element_size() for mean in means)
    extra = (held > 0).sum(-1, dtype=torch.float64) * page_bytes
    return replace(
        selection,
        pseudo=PseudoTokens(keys, values, left.log()),
        extra_bytes=selection.extra_bytes + extra,
    )


def check_centroids(method: str, page: int, *, sampled: bool) -> None:
    """Refuse pages that are no stretches of a page of the pool, and lists whose sample stands for the rest already."""
    if page and sampled:
        raise UsageError(
            f"{method}: centroids={page} would count what the tail stands for a second time; leave out the one, or "
            "tail and eps"
        )
    if page and (not 0 < page <= LARGEST_PAGE or page & (page - 1)):
        raise UsageError(
            f"{method}: centroids={page} is no power of two up to {LARGEST_PAGE}; use for example centroids=64, "
            "or 0 for none"
        )


def _unread(mean: Tensor, held: Tensor, tokens: Tensor, number: Tensor, left: Tensor) -> Tensor:
    """Means of the tokens that are not read, ``[batch, kv_heads, pages, head_dim]``; 0 where there are none.

    Args:
        mean: ``[batch, pages, kv_heads, head_dim]`` of pages of ``held`` ``[batch, pages]`` tokens.
        tokens: ``[batch, kv_heads, capacity, head_dim]``, those that are read, in pages ``number``.
        left: ``[batch, kv_heads, pages]``, how many are not.
    """
    total = mean.transpose(1, 2).float() * held[:, None, :, None]
    read = total.new_zeros(*number.shape[:2], total.shape[2] + 1, total.shape[3])
    read = read.scatter_add(2, number[..., None].expand_as(tokens), tokens.float())[:, :, :-1]
    # A page of another request, which this one does not hold, may be anything.
    left = left[..., None]
    return torch.where(left > 0, (total - read) / left.clamp(min=1), 0)
