"""Quest (arXiv 2406.10774): the pages whose keys may match the queries best, judged by bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from specattn.kernels.nucleus import top_k
from specattn.kernels.page_scores import page_scores, page_scores_reference, runs_on
from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_choice
from specattn.selection.groups import POLICIES
from specattn.stores.base import pool_page
from specattn.stores.page_bounds import PageBounds, PageBoundsStore

LEAST_PAGES = 3
"""Pages that are read however small the budget is, as in the paper's evaluation."""


@dataclass(frozen=True)
class Quest(Method):
    """The pages with the highest bounds of what a query times one of their keys may be.

    Only pages that the context fills are scored; the page in which it ends is always read, and no other is forced. The
    paper selects for each query head and one query at a time. Here the queries of a round and of a KV head's group
    share a list: a softmax over the pages, which keeps each query's order, makes their scores comparable.

    Attributes:
        budget: tokens of the context that are read, in whole pages and at least 3 of them: a fraction up to 1, a
            token count above. The round's own tokens come on top.
        page: tokens a page, a power of two.
        gqa: how the query heads of a KV head agree: ``mean`` or ``max`` of their softmaxes; ``union`` takes the best
            pages of each and may exceed the budget.
        aggregate: the same for the rows of the round.
    """

    name: ClassVar[str] = "quest"

    budget: float = 0.1
    page: int = 16
    gqa: str = "mean"
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.name, self.budget)
        check_choice(self.name, "gqa", self.gqa, POLICIES)
        check_choice(self.name, "aggregate", self.aggregate, POLICIES)
        pool_page(self.stores)

    @property
    def stores(self) -> tuple[PageBounds]:
        return (PageBounds(self.page),)

    def select(self, state: LayerState) -> Selection:
        starts = state.round.starts
        filled = starts // self.page
        budget = -(-budget_tokens(self.budget, starts) // self.page)
        count = budget.clamp(min=LEAST_PAGES) - (starts % self.page > 0).long()  # besides the last page
        lower, upper, entries = self._bounds(state)
        score = page_scores if runs_on(state.queries, state.round.kv_heads) else page_scores_reference
        scores = score(state.queries, lower, upper, entries, filled, state.scaling)
        chosen = self._best(scores, count, filled)
        selection = Selection.from_mask(self._tokens(chosen, state.round))
        # A budget that covers all filled pages leaves nothing to score.
        scored = torch.where(filled > count, filled, 0).double()
        page_bytes = 2 * lower[0].numel() * lower.element_size()
        return replace(selection, extra_bytes=scored * page_bytes)

    def _bounds(self, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest channels of the store's pages, and where in it those of each request lie."""
        store = state.source.store(self.stores[0])
        assert isinstance(store, PageBoundsStore)
        starts = state.round.starts
        first = torch.arange(0, state.round.max_length, self.page, device=starts.device)
        entries = state.source.rows(first.expand(len(starts), -1)) // self.page
        bounds = store.bounds[state.layer]
        return bounds[:, 0], bounds[:, 1], entries

    def _best(self, scores: Tensor, count: Tensor, filled: Tensor) -> Tensor:
        """The ``count`` best of the first ``filled`` pages, of ``scores`` ``[batch, kv_heads, rows, group, pages]``.

        Returns:
            boolean ``[batch, kv_heads, pages]``.
        """
        scored = torch.arange(scores.shape[-1], device=scores.device) < filled.view(-1, 1, 1, 1, 1)
        scores = _combined(_combined(scores.log_softmax(-1), self.aggregate, 2), self.gqa, 3)
        least = scores.masked_fill(~scored, float("inf")).amin(-1, keepdim=True)
        # Logarithms keep pages apart whose weights are too small for a float; top_k wants them from 0 up.
        return top_k(scores - least, count.view(-1, 1, 1, 1), filled).any(3).any(2)

    def _tokens(self, pages: Tensor, info: RoundState) -> Tensor:
        """The tokens of ``pages`` and all from the page on in which the context ends: ``[batch, kv_heads, length]``."""
        position = torch.arange(info.max_length, device=pages.device)
        last = (info.starts // self.page * self.page).view(-1, 1, 1)
        mask = pages.repeat_interleave(self.page, -1)[..., : info.max_length]
        return (mask | (position >= last)) & (position < info.lengths.view(-1, 1, 1))


def _combined(scores: Tensor, policy: str, dim: int) -> Tensor:
    """Logarithms of the mean (but for a constant) or largest weight along ``dim``; with ``union`` all are kept."""
    if policy == "union":
        return scores
    return scores.amax(dim, keepdim=True) if policy == "max" else scores.logsumexp(dim, keepdim=True)
