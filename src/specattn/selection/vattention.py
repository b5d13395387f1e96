"""vAttention (arXiv 2510.05688): heavy tokens exactly, and a sample of the others that is as large as it must be."""

from __future__ import annotations

import math
from collections.abc import Mapping as Options
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.sampling import Stream
from specattn.selection.base import LayerState, Method, Need, RoundState, Selection
from specattn.selection.budget import check_extent, extent_tokens
from specattn.selection.checks import check_at_least, check_choice, check_inside, check_probability
from specattn.selection.random import layer_weights
from specattn.selection.residual_sampling import with_replacement, without_replacement
from specattn.selection.residual_statistics import RelativeSpread, relative_spread
from specattn.selection.sampling_budget import draws_for_ratio, draws_for_sum, without_repetition
from specattn.selection.topk import TopK
from specattn.selection.weighted_lists import weighted_list

if TYPE_CHECKING:
    from specattn.mapping import Mapping
    from specattn.stores.base import StoreSpec


HEAVY: dict[str, object] = {"budget": 0.02, "sink": 0, "window": 0}
"""Options of a base that is named without them: a fiftieth of the context; sinks and window are the wrapper's."""


@dataclass(frozen=True)
class VAttention(Method):
    """The base's tokens, sinks and window exactly; the residual by a uniform sample with weights.

    The sample is so large that, by the central limit theorem, each query's attention output has a relative error above
    ``eps`` with probability ``delta`` at most. A pilot sample tells how large that is; rows and query heads that share
    a list take the largest of their sizes. See ``docs/methods/vattention.md`` for the derivation and what it assumes.

    Attributes:
        base: the method that names the heavy tokens: any that returns plain lists.
        eps, delta: the promise.
        verify: what it is about: ``output``, or only the ``numerator`` or the ``denominator`` of softmax.
        sink, window: first and most recent tokens that are read exactly, on top of the base's: a fraction of the
            context below 1, a number of tokens from 1 on.
        sample: share of the residual in the pilot sample.
        least: fewest tokens in the pilot, and in the sample.
        replacement: draw the sample with replacement.
        seed: of both samples, which also depend on where the round begins.
    """

    name: ClassVar[str] = "vattention"
    selects: ClassVar[bool] = False
    wrapped_defaults: ClassVar[Options[str, object]] = HEAVY

    base: Method = field(default_factory=lambda: TopK(budget=0.02, sink=0, window=0))
    eps: float = 0.05
    delta: float = 0.05
    verify: str = "output"
    sink: float = 128
    window: float = 128
    sample: float = 0.01
    least: int = 32
    replacement: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_base(self.base)
        check_inside(self.name, "eps", self.eps)
        check_inside(self.name, "delta", self.delta)
        check_choice(self.name, "verify", self.verify, ("output", "numerator", "denominator"))
        check_extent(self.name, "sink", self.sink)
        check_extent(self.name, "window", self.window)
        check_probability(self.name, "sample", self.sample)
        check_at_least(self.name, "least", self.least, 2)

    @property
    def needs(self) -> Need:
        return self.base.needs

    @property
    def promised_error(self) -> float | None:
        return self.eps if self.verify == "output" else None

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        return self.base.stores

    def draft_heads(self, mapping: Mapping | None) -> Tensor | None:
        return self.base.draft_heads(mapping)

    def prepare(self, state: RoundState) -> object:
        """What the base prepares."""
        return self.base.prepare(state)

    def select(self, state: LayerState) -> Selection:
        base = self.base.select(state)
        exact, residual = self._split(state.round, base)
        size = residual.sum(-1)
        pilot = without_replacement(residual, self._pilot_tokens(size), self._numbers(state, Stream.PILOT))
        count = self._sample_tokens(self._spread(state, exact, pilot, size), size)
        draw = with_replacement if self.replacement else without_replacement
        times = draw(residual, count, self._numbers(state, Stream.RESIDUAL))
        # The pilot decides how many are drawn. Were it a part of the sample too, the estimates would be biased.
        unused = (pilot > times).sum((1, 2), dtype=torch.float64)
        row_bytes = 2 * state.queries.shape[-1] * state.queries.element_size()
        return replace(
            weighted_list(exact, times, (count / size)[..., None]),
            extra_bytes=base.extra_bytes + unused * row_bytes,
        )

    def _split(self, state: RoundState, base: Selection) -> tuple[Tensor, Tensor]:
        """Masks ``[batch, kv_heads, length]`` of what is read exactly and of the other visible tokens."""
        position = torch.arange(state.max_length, device=state.starts.device)
        starts = state.starts[:, None]
        sink, window = (extent_tokens(extent, starts) for extent in (self.sink, self.window))
        forced = ((position < sink) | (position >= starts - window))[:, None]
        visible = (position < state.lengths[:, None])[:, None]
        chosen = base.to_mask(state.max_length) | forced
        return chosen & visible, ~chosen & visible

    def _pilot_tokens(self, size: Tensor) -> Tensor:
        wanted = torch.ceil(size.double() * self.sample).long()
        return torch.minimum(wanted.clamp(min=self.least), size)

    def _spread(self, state: LayerState, exact: Tensor, pilot: Tensor, size: Tensor) -> RelativeSpread:
        drawn = Selection.from_mask(pilot > 0)
        most = max(self.least, math.ceil(state.round.max_length * self.sample))
        drawn = Selection(drawn.indices[..., :most], drawn.counts)
        return relative_spread(state, Selection.from_mask(exact), drawn, size)

    def _sample_tokens(self, spread: RelativeSpread, size: Tensor) -> Tensor:
        """int64 ``[batch, kv_heads]``: the most that any query of the list needs."""
        if self.verify == "output":
            draws = draws_for_ratio(spread.numerator, spread.denominator, self.eps, self.delta)
        else:
            draws = draws_for_sum(getattr(spread, self.verify), self.eps, self.delta)
        draws = draws.amax((2, 3))
        if not self.replacement:
            draws = without_repetition(draws, size)
        return torch.minimum(draws.ceil().clamp(min=self.least), size.double()).long()

    def _numbers(self, state: LayerState, stream: Stream) -> Tensor:
        return layer_weights(state.round, state.layer, self.seed, stream)


def _check_base(base: Method) -> None:
    """Refuse a base without plain lists, or one whose lists hold only what it is forced to hold."""
    if not base.wrappable:
        raise UsageError(
            f"vattention: base={base.name} returns no plain lists to extend; "
            "use for example topk, quest, specattn"
        )
    own: dict[str, Any] = base.options()
    budget, forced = own.get("budget", 1), own.get("sink", 0) + own.get("window", 0)
    if 1 < budget < forced:
        raise UsageError(
            f"vattention: base={base.spec()} may read {budget:g} tokens, below its sink and window of {forced}: "
            "it would find no heavy ones; give it sink=0 and window=0, for vattention has its own"
        )
