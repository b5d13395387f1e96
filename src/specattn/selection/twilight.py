"""Twilight (arXiv 2502.02770): another method's selection, pruned to the nucleus of its estimated attention."""

from __future__ import annotations

from collections.abc import Mapping as Options
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.listed_attention import listed_attention, listed_attention_reference, runs_on
from specattn.kernels.nucleus import nucleus
from specattn.selection.base import LayerState, Method, Need, RoundState, Selection
from specattn.selection.checks import check_choice, check_probability
from specattn.selection.groups import POLICIES, select_for_groups
from specattn.selection.quest import Quest
from specattn.stores.base import StoreSpec
from specattn.stores.quantised_keys import QuantisedKeys, QuantisedKeysStore

if TYPE_CHECKING:
    from specattn.mapping import Mapping

CANDIDATES = 0.25
"""Budget of a base that is named without one: a quarter of the context, as in the paper."""


@dataclass(frozen=True)
class Twilight(Method):
    """Top-p over attention that a quantised copy of the keys estimates, among the tokens that ``base`` selects.

    A base selects generously, so that a token is lost only if the estimate, too, thinks little of it; what is read of
    keys and values adapts to how flat or peaked the attention is. A base named in text without a budget gets a quarter
    of the context. Its ``dense_layers`` do not matter: the wrapper's do.

    Attributes:
        base: any method that returns plain lists, ``full`` for all tokens.
        p: share of the candidates' estimated attention mass that is kept; with 1 nothing is pruned.
        bits: bits a channel of the quantised keys: 2, 4 or 8.
        gqa: how the query heads of a KV head agree: ``union`` of their nuclei (paper), or one nucleus of their ``mean``
            or ``max``.
        aggregate: ``mean``: one nucleus of the mean of the round's rows; ``union``: the rows' nuclei joined.
    """

    name: ClassVar[str] = "twilight"
    selects: ClassVar[bool] = False
    wrapped_defaults: ClassVar[Options[str, object]] = {"budget": CANDIDATES}

    base: Method = field(default_factory=lambda: Quest(budget=CANDIDATES))
    p: float = 0.85
    bits: int = 4
    gqa: str = "union"
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base.wrappable:
            raise UsageError(
                f"{self.name}: base={self.base.name} returns no plain lists to prune; "
                "use for example quest, full, specattn"
            )
        check_probability(self.name, "p", self.p)
        check_choice(self.name, "gqa", self.gqa, POLICIES)
        check_choice(self.name, "aggregate", self.aggregate, ("mean", "union"))
        QuantisedKeys(self.bits)

    @property
    def needs(self) -> Need:
        return self.base.needs

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        return (*self.base.stores, QuantisedKeys(self.bits))

    def prepare(self, state: RoundState) -> object:
        """What the base prepares."""
        return self.base.prepare(state)

    def draft_heads(self, mapping: Mapping | None) -> Tensor | None:
        return self.base.draft_heads(mapping)

    def select(self, state: LayerState) -> Selection:
        candidates = self.base.select(state)
        if self.p >= 1:  # nothing to prune, so nothing to estimate
            return candidates
        rows = state.round.rows
        weights = self._attention(state, candidates)
        if self.aggregate == "mean":
            weights = weights.mean(2, keepdim=True)

        def top_p(scores: Tensor) -> Tensor:
            # The lists end with the round's own tokens, which stay.
            return nucleus(scores, self.p, candidates.counts.flatten(), recent=rows)

        mask = select_for_groups(weights.flatten(0, 1), 1, self.gqa, top_p).any(1)
        kept = candidates.narrowed(mask.view_as(candidates.indices))
        entries = candidates.counts.sum(-1, dtype=torch.float64)
        read = entries * QuantisedKeys(self.bits).entry_bytes(state.queries.shape[-1])
        return replace(kept, extra_bytes=candidates.extra_bytes + read)

    def _attention(self, state: LayerState, candidates: Selection) -> Tensor:
        """The rows' attention over the candidates they see: ``[batch, kv_heads, rows, group, capacity]``."""
        store = state.source.store(QuantisedKeys(self.bits))
        assert isinstance(store, QuantisedKeysStore)
        copy = store.layers[state.layer]
        attend = listed_attention if runs_on(state.queries, copy) else listed_attention_reference
        rows = state.source.rows(candidates.indices.clamp(min=0))
        return attend(state.queries, copy, rows, candidates.counts, state.scaling)
