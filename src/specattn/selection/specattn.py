"""SpecAttn (arXiv 2510.27641): the draft's attention decides which tokens the target reads.

The paper maps every target layer to a draft layer and joins the nuclei of the round's rows. The default maps every KV
head to a mixture of all draft heads, which reads far less for the same fidelity, and takes one nucleus of the rows'
mean, which is about as good as the union and costs one selection instead of gamma.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from specattn.kernels.echoes import echo_mask, echoes_reference
from specattn.kernels.nucleus import nucleus
from specattn.selection.base import LayerState, Method, Need, RoundState, Selection
from specattn.selection.centroids import check_centroids, with_centroids
from specattn.selection.checks import check_at_least, check_choice, check_forced, check_probability
from specattn.selection.even_rate import check_power, check_rate, even_rate_lists
from specattn.selection.groups import POLICIES, select_for_groups
from specattn.selection.signals import check_signals, joined
from specattn.selection.verified_tail import Promise, Residual, check_promise, verified_lists
from specattn.selection.weighted_tail import add_tail, check_tail, residual_weights
from specattn.stores.page_means import PageMeans
from specattn.stores.quantised_keys import QuantisedKeys

if TYPE_CHECKING:
    from specattn.mapping import Mapping
    from specattn.stores.base import StoreSpec

DRAFT_KEYS = {"int8": 8, "int4": 4, "none": 0}
"""Bits of the copy that the draft's scores are made from; 0 for none."""


@dataclass(frozen=True)
class SpecAttn(Method):
    """Top-p over the draft's attention, mapped to the target's heads.

    Attributes:
        p: share of the mapped attention mass that is read.
        map: ``heads``, a mixture of all draft heads for each KV head; ``global``, the same over a few draft heads;
            ``layer``, the paper's one draft layer for each target layer.
        aggregate: ``mean``, one nucleus of the rows' mean; ``rms``, of their root mean square; ``union``, the rows'
            nuclei joined (paper).
        every_row: the draft takes one more step, so that the last row of the round has a prediction too. Without it the
            others speak for it.
        echo: for each row of the round, so many tokens behind earlier occurrences of what it is fed are read as well,
            see :mod:`specattn.kernels.echoes`. A draft with lists of its own reads what follows the pending token.
        sink, window: first and most recent tokens that are always read; their mass counts towards ``p``.
        dense_below: contexts of fewer tokens, the round's own included, are read whole.
        granularity: ``token``, or ``page``: every page that holds a selected token.
        page: tokens a page.
        gqa: ``mean``: a mixture fitted to the group's mean; ``max`` and ``union``: one for every query head.
        signals: ``draft``, or ``both``: joined with what the target attended to in its last dense pass.
        refresh: with both signals, every how many rounds the target reads everything, to see again; 0: never.
        centroids: tokens a page, of which what is not read is represented by its mean key and value; 0: by nothing.
        tail: tokens sampled from what the nucleus leaves out, which stand for all of it: a fraction of the context up
            to 1, a token count above; 0 for none. With ``eps`` it is the most that may be sampled; 0 for no limit.
        rate: instead of a nucleus and a tail, tokens are drawn at one rate in all heads: the share of the context that
            a head with flat attention reads, and no head reads more; 0 for none. Then ``p`` says nothing.
        a: share of uniform probability in the sample; the rest is the mapped attention.
        power: a sampled token that was drawn with probability pi counts ``pi ** -power`` times: 1 has no bias, less
            varies less.
        seed: of the sample, which also depends on where the round begins.
        eps, delta: sample as many as keep each query's output within a relative error of ``eps`` in all but ``delta``
            of the cases; an ``eps`` of 0 promises nothing.
        pilot: draws that tell how many are needed.
        draft_p: share of its own attention that the draft reads in its steps; 1 reads all. Only rounds that run on the
            device alone can read less, see :mod:`specattn.fast.sparse_draft`.
        draft_keys: what scores are made from with a ``draft_p`` below 1: ``int8`` or ``int4``, a copy of the draft's
            keys in so many bits a channel; ``none``, the keys themselves.
    """

    name: ClassVar[str] = "specattn"

    p: float = 0.95
    map: str = "heads"
    aggregate: str = "mean"
    every_row: bool = False
    echo: int = 0
    sink: int = 4
    window: int = 16
    dense_below: int = 0
    granularity: str = "token"
    page: int = 16
    gqa: str = "mean"
    signals: str = "draft"
    refresh: int = 0
    centroids: int = 0
    tail: float = 0
    rate: float = 0
    a: float = 0.2
    power: float = 1.0
    seed: int = 0
    eps: float = 0
    delta: float = 0.05
    pilot: int = 256
    draft_p: float = 1.0
    draft_keys: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self.name, "p", self.p)
        check_probability(self.name, "draft_p", self.draft_p)
        check_choice(self.name, "draft_keys", self.draft_keys, tuple(DRAFT_KEYS))
        check_choice(self.name, "map", self.map, ("heads", "global", "layer"))
        check_choice(self.name, "aggregate", self.aggregate, ("mean", "rms", "union"))
        check_forced(self.name, self.sink, self.window)
        check_at_least(self.name, "echo", self.echo, 0)
        check_at_least(self.name, "dense_below", self.dense_below, 0)
        check_choice(self.name, "granularity", self.granularity, ("token", "page"))
        check_at_least(self.name, "page", self.page, 1)
        check_choice(self.name, "gqa", self.gqa, POLICIES)
        check_signals(self)
        check_tail(self.name, self.tail, self.a)
        check_promise(self.name, self.eps, self.delta, self.pilot)
        replaced = bool(self.tail or self.eps or self.centroids or self.granularity == "page")
        check_rate(self.name, self.rate, replaced=replaced)
        check_power(self.name, self.power, promised=bool(self.eps))
        check_centroids(self.name, self.centroids, sampled=bool(self.tail or self.eps))

    @cached_property
    def needs(self) -> Need:
        scores = Need.SCORES if self.signals == "both" else Need.NOTHING
        last = Need.EVERY_ROW if self.every_row else Need.NOTHING
        text = Need.TEXT if self.echo else Need.NOTHING
        return Need.DRAFT | Need.MAPPING | scores | last | text

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        return (PageMeans(self.centroids),) if self.centroids else ()

    @property
    def draft_stores(self) -> tuple[StoreSpec, ...]:
        bits = DRAFT_KEYS[self.draft_keys]
        return (QuantisedKeys(bits),) if bits and self.draft_p < 1 else ()

    @property
    def wrappable(self) -> bool:
        return not (self.tail or self.rate or self.eps or self.centroids or self.refresh)

    @property
    def promised_error(self) -> float | None:
        return self.eps or None

    def prepare(self, state: RoundState) -> Selection | Residual:
        """The lists of all layers in one go, or what they are drawn from: ``[batch, layers, kv_heads, capacity]``."""
        # [batch, rows, layers, heads, length]; one row if the rows' mean is what counts.
        weights = self._mapped(state)
        if state.scores is not None:
            weights = joined(weights, state)
        if self.rate:
            return self._at_rate(state, weights.mean(1))
        batch = weights.shape[0]

        def top_p(scores: Tensor) -> Tensor:
            return nucleus(scores, self.p, state.lengths, sink=self.sink, recent=self.window + state.rows)

        if self.map == "layer":
            mask = top_p(weights).expand(-1, -1, -1, state.kv_heads, -1)
        elif self.gqa == "mean":
            mask = top_p(weights)
        else:
            mask = select_for_groups(weights, state.kv_heads, self.gqa, top_p)
        mask = mask.any(1)
        mask = mask | self._certain(state, mask.shape[-1])[:, None, None]
        if self.granularity == "page":
            mask = _whole_pages(mask, self.page) & _visible(state, mask.shape[-1]).view(batch, 1, 1, -1)
        if self.eps:
            return Residual(mask, residual_weights(state, mask, weights.mean(1), self.a))
        if self.tail:
            return add_tail(state, mask, weights.mean(1), self.tail, self.a, self.seed, self.power)
        return Selection.from_mask(mask)

    def select(self, state: LayerState) -> Selection:
        selection = self._lists(state)
        if state.round.scores is not None:
            selection = replace(selection, extra_bytes=selection.extra_bytes + state.round.scores.nbytes)
        return with_centroids(state, selection, PageMeans(self.centroids)) if self.centroids else selection

    def _at_rate(self, state: RoundState, density: Tensor) -> Selection:
        """Lists that are drawn: what is always read, and in turns everything, stays certain."""
        position = torch.arange(density.shape[-1], device=density.device)
        ends = state.lengths[:, None]
        forced = (position < self.sink) | (position >= ends - self.window - state.rows)
        forced = (forced & _visible(state, density.shape[-1])) | self._certain(state, density.shape[-1])
        return even_rate_lists(
            state,
            forced[:, None, None],
            density,
            self.rate,
            a=self.a,
            power=self.power,
            seed=self.seed,
        )

    def _certain(self, state: RoundState, length: int) -> Tensor:
        """``[batch, length]``: visible positions that are read whatever the draft says, sink and window aside."""
        certain = self._whole(state)[:, None].expand(-1, length)
        if state.text is not None:
            found = echoes_reference(*state.text, state.starts, state.rows, self.echo)
            certain = certain | echo_mask(found, length)
        return certain & _visible(state, length)

    def _whole(self, state: RoundState) -> Tensor:
        """Whether each request is read whole, bool ``[batch]``: it is short, or a refresh is due."""
        short = state.lengths < self.dense_below
        return short if state.scores is None else short | state.scores.everything

    def _lists(self, state: LayerState) -> Selection:
        if isinstance(state.prepared, Residual):
            promise = Promise(self.eps, self.delta, self.pilot, self.tail, self.seed)
            return verified_lists(state, state.prepared, promise)
        assert isinstance(state.prepared, Selection)
        return state.prepared.of_layer(state.layer)

    def draft_heads(self, mapping: Mapping | None) -> Tensor | None:
        return mapping.global_heads if self.map == "global" and mapping is not None else None

    def reads_everything(self, rounds: int) -> bool:
        return 0 < self.refresh <= rounds

    def _mapped(self, state: RoundState) -> Tensor:
        draft, mapping = state.draft, state.mapping
        assert draft is not None and mapping is not None
        if self.map == "layer":
            rows = draft.by_layer()[:, :, mapping.layer_map][:, :, :, None]
            return self._aggregated(rows)
        rows = draft.probabilities
        if self.aggregate == "mean":
            rows = rows.mean(1, keepdim=True)
        mixture = self._mixture(state)
        mixed = torch.matmul(mixture.flatten(0, 1), rows)
        return self._aggregated(mixed.unflatten(2, mixture.shape[:2]))

    def _aggregated(self, rows: Tensor) -> Tensor:
        """One row for all, unless each is to have its nucleus."""
        if self.aggregate == "mean":
            return rows.mean(1, keepdim=True)
        return rows.square().mean(1, keepdim=True).sqrt() if self.aggregate == "rms" else rows

    def _mixture(self, state: RoundState) -> Tensor:
        """Weights ``[layers, heads, draft heads]``: of KV heads, or of query heads where the policy needs them."""
        mapping = state.mapping
        assert mapping is not None
        if self.map == "global":
            return mapping.global_kv if self.gqa == "mean" else mapping.global_query
        return mapping.heads_kv if self.gqa == "mean" else mapping.heads_query


@dataclass(frozen=True)
class SpecAttnPaper(SpecAttn):
    """The paper's method: one draft layer for each target layer, the union over the rows, no sink, no window."""

    name: ClassVar[str] = "specattn-paper"

    map: str = "layer"
    aggregate: str = "union"
    sink: int = 0
    window: int = 0


def _whole_pages(mask: Tensor, page: int) -> Tensor:
    """Extend ``mask`` ``[..., length]`` to every page with a selected token."""
    length = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, -length % page)).unflatten(-1, (-1, page))
    return padded.any(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :length]


def _visible(state: RoundState, length: int) -> Tensor:
    """``[batch, length]``: positions that the round's last row can see."""
    return torch.arange(length, device=state.starts.device) < state.lengths[:, None]
