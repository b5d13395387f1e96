"""From the draft's scores to the lists of all layers, in two launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specattn.fast.operations import Operations
from specattn.geometry import KVGeometry
from specattn.mapping.artifact import Mapping
from specattn.sampling import Stream
from specattn.selection.base import Method, Selection
from specattn.selection.budget import budget_tokens
from specattn.selection.random import round_numbers
from specattn.selection.self import Self
from specattn.selection.specattn import SpecAttn
from specattn.selection.weighted_tail import comb_shift


def unsupported(method: Method, *, lossless: bool = False) -> str | None:
    """Why the fast path cannot select for ``method``; ``None`` if it can."""
    if method.name == "dense":
        return None
    if isinstance(method, Self):
        return None if lossless else f"{method.name} has a fast path in the lossless mode only"
    if not isinstance(method, SpecAttn):
        return f"method {method.name!r} has no fast path yet: dense and specattn have"
    wanted = {"aggregate": "mean", "granularity": "token", "gqa": "mean", "centroids": 0, "signals": "draft"}
    for option, value in wanted.items():
        if getattr(method, option) != value:
            return f"{method.name} has a fast path for {option}={value} only"
    if method.eps:
        return f"{method.name} has a fast path for eps=0 only"
    if method.echo and (method.rate or method.tail):
        return f"{method.name} has a fast path for echo=0 only, with a rate or a tail"
    if method.rate and method.dense_below:
        return f"{method.name} has a fast path for dense_below=0 only, with a rate"
    return None


class Scores(Protocol):
    """What the draft leaves behind of a round."""

    def mix(self, operations: Operations, weights: Tensor, seen: Tensor, out: Tensor) -> None:
        """See :meth:`specattn.fast.draft.ExportedScores.mix`."""


@dataclass(frozen=True)
class Selector:
    """The nucleus of the mapped scores, for all layers at once.

    Attributes:
        weights: float32 ``[layers * kv_heads, exported heads]``.
        mapped: ``[batch, layers * kv_heads, length]``, what the draft's attention says of each KV head.
        lists: indices ``[batch, layers * kv_heads, length]`` and their counts; if some are drawn, their log-weights.
    """

    method: SpecAttn
    operations: Operations
    geometry: KVGeometry
    weights: Tensor
    mapped: Tensor
    lists: Selection

    @classmethod
    def allocate(
        cls,
        method: SpecAttn,
        mapping: Mapping,
        operations: Operations,
        geometry: KVGeometry,
        batch: int,
        length: int,
    ) -> Selector:
        """Lists of at most ``length`` tokens."""
        weights = mixture_weights(method, mapping).flatten(0, 1).float().contiguous()
        lists = (batch, len(weights))
        device = weights.device
        return cls(
            method,
            operations,
            geometry,
            weights,
            torch.zeros(*lists, length, dtype=operations.probabilities, device=device),
            Selection(
                torch.full((*lists, length), -1, dtype=torch.int32, device=device),
                torch.zeros(lists, dtype=torch.int32, device=device),
                torch.zeros(*lists, length, device=device) if method.tail or method.rate else None,
            ),
        )

    def select(self, scores: Scores, lengths: Tensor, rows: int, text: Tensor, slots: Tensor) -> Selection:
        """The lists ``[batch, layers, kv_heads, length]`` of a round of ``rows`` rows behind ``lengths`` tokens.

        Args:
            text: int32 ``[slots, length]``, those of the round's rows among them.
            slots: ``[batch]``, whose round it is.
        """
        ends = (lengths + rows).int()
        # Without a step on the last proposal the draft has seen the last but one.
        seen = ends if self.method.every_row else ends - 1
        scores.mix(self.operations, self.weights, seen, self.mapped)
        if self.method.dense_below:
            self._keep_short_ones_whole(ends, seen)
        echoes = None
        if self.method.echo:
            echoes = self.operations.echoes(text, slots, lengths, rows, self.method.echo)
        self._list(lengths, ends, self.method.window + rows, echoes)
        shape, weights = (self.geometry.layers, self.geometry.kv_heads), self.lists.log_weights
        return Selection(
            self.lists.indices.unflatten(1, shape),
            self.lists.counts.unflatten(1, shape),
            None if weights is None else weights.unflatten(1, shape),
        )

    def _keep_short_ones_whole(self, ends: Tensor, seen: Tensor) -> None:
        """Make all scores of short contexts infinite, of which lists leave nothing out.

        No more of them than the next mixture writes over, whichever request it is of: of a long context's own tokens
        one may be unseen, and must not be infinite.
        """
        position = torch.arange(self.mapped.shape[-1], device=ends.device)
        short = (ends < self.method.dense_below)[:, None] & (position < seen[:, None])
        self.mapped.masked_fill_(short[:, None], float("inf"))

    def _list(self, lengths: Tensor, ends: Tensor, recent: int, echoes: Tensor | None) -> None:
        """Write ``lists``: what ``mapped`` says of the first ``ends`` tokens, the ``recent`` ones among them."""
        method, operations = self.method, self.operations
        room = {"capacity": self.lists.indices.shape[-1], "out": self.lists}
        options = {"sink": method.sink, "recent": recent, **room}
        if not (method.rate or method.tail):
            operations.nucleus_lists(self.mapped, method.p, ends, also=echoes, fill=False, **options)
            return
        drawn = (self._shifts(lengths), method.a)
        options |= {"power": method.power}
        if method.rate:
            operations.rate_lists(self.mapped, method.rate, ends, *drawn, **options)
        else:
            draws = budget_tokens(method.tail, lengths).int()
            operations.tail_lists(self.mapped, method.p, ends, draws, *drawn, **options)

    def _shifts(self, lengths: Tensor) -> Tensor:
        """Where the comb of each list begins that is drawn."""
        lists = torch.arange(len(self.weights), device=lengths.device)
        return comb_shift(round_numbers(lengths, self.method.seed, lists, 2, Stream.TAIL))


def mixture_weights(method: SpecAttn, mapping: Mapping) -> Tensor:
    """Weights ``[layers, kv_heads, exported heads]`` of the method's map."""
    if method.map == "global":
        return mapping.global_kv
    if method.map == "heads":
        return mapping.heads_kv
    geometry = mapping.metadata.geometry
    layer = torch.eye(geometry.draft_layers, device=mapping.heads_kv.device)[mapping.layer_map]
    by_head = layer.repeat_interleave(geometry.draft_heads, 1) / geometry.draft_heads
    return by_head[:, None].expand(-1, geometry.kv_heads, -1)
