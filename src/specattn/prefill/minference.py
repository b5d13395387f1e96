"""MInference (arXiv 2407.02490): each head has one of three sparse patterns, and the text says where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.dense import Dense
from specattn.prefill.head_patterns import HeadPattern, HeadPatterns
from specattn.prefill.lines import line_scores
from specattn.prefill.patterns import Pattern, block_grid, causal_products, computed_share
from specattn.prefill.pooled import pooled_attention
from specattn.prefill.shapes import (
    BLOCK_SPARSE,
    KINDS,
    VERTICAL_SLASH,
    Sizes,
    a_shape,
    block_sparse,
    vertical_slash,
)
from specattn.selection.budget import budget_tokens, check_budget
from specattn.selection.checks import check_at_least, check_forced

Evidence = tuple[Tensor, Tensor] | Tensor | None
"""Scores of the lines of a vertical-slash head, of the blocks of a block-sparse one, nothing for an A-shape."""


@dataclass(frozen=True)
class MInference(PrefillMethod):
    """A-shape, vertical-slash or block-sparse attention, chosen for each head offline.

    Attributes:
        vertical, slash: lines of a head: a fraction of the length up to 1, a number above.
        last: queries at the end of the prompt, or of its chunk, that say where the lines are.
        sink, window: first keys and nearest distances among a head's lines in any case.
        block: positions a block of queries and keys.
        ratio: factor of all heads' sizes.
        tuned: file of ``specattn tune minference`` with a pattern for each head, in place of vertical-slash
            for all of them; its sizes take the place of the others.
    """

    name: ClassVar[str] = "minference"

    vertical: float = 1000
    slash: float = 6096
    last: int = 64
    sink: int = 30
    window: int = 100
    block: int = 64
    ratio: float = 1.0
    tuned: str = ""

    def __post_init__(self) -> None:
        check_budget(self.name, self.vertical, "vertical")
        check_budget(self.name, self.slash, "slash")
        if self.ratio <= 0:
            raise UsageError(
                f"{self.name}: ratio={self.ratio} is not above 0; use 1 for the sizes as they are"
            )
        check_at_least(self.name, "last", self.last, 1)
        check_forced(self.name, self.sink, self.window)
        check_at_least(self.name, "block", self.block, 1)
        if self.tuned and replace(self, tuned="", ratio=1.0) != MInference():
            raise UsageError(
                f"{self.name}: tuned={self.tuned} brings its own sizes; leave out all other options but ratio"
            )

    def check(self, config: Any) -> None:
        if self._tuned is not None:
            self._tuned.check(config)

    def attention(self, call: PrefillCall) -> PrefillOutput:
        heads = self.heads(call)
        if all(head.covers(len(call.key), self.block) for head in heads):
            return Dense().attention(call)
        out = torch.empty_like(call.query)
        products = torch.zeros((), dtype=torch.float64, device=out.device)
        for kind in KINDS:
            chosen = [number for number, head in enumerate(heads) if head.kind == kind]
            if chosen:
                sizes = _sizes([heads[number] for number in chosen], out.device)
                pattern = self.pattern(call, self.evidence(call, kind, chosen), sizes)
                out[:, chosen] = pattern.attention(call, chosen)
                products += pattern.products(call).sum() + len(chosen) * self.estimation(call, kind)
        return PrefillOutput(out, computed_share(call, products))

    def heads(self, call: PrefillCall) -> list[HeadPattern]:
        """The pattern of each query head of the call's layer."""
        if self._tuned is not None:
            found: Sequence[HeadPattern] = self._tuned.layers[call.layer]
        else:
            vertical, slash = (
                int(budget_tokens(budget, torch.tensor(len(call.key))))
                for budget in (self.vertical, self.slash)
            )
            found = [HeadPattern(VERTICAL_SLASH, vertical, slash)] * call.query.shape[1]
        return [head.scaled(self.ratio) for head in found]

    def evidence(self, call: PrefillCall, kind: str, heads: Sequence[int]) -> Evidence:
        """What says where the patterns of ``heads`` lie, if they are of this kind."""
        if kind == VERTICAL_SLASH:
            return line_scores(call, heads, self.last)
        return pooled_attention(call, heads, block_grid(call, self.block)) if kind == BLOCK_SPARSE else None

    def estimation(self, call: PrefillCall, kind: str) -> int:
        """Products that the evidence for one head takes: of its last queries, or of its pooled blocks."""
        if kind == VERTICAL_SLASH:
            last = min(self.last, len(call.query))
            return causal_products(len(call.key) - last, last)
        grid = block_grid(call, self.block)
        return grid.query_blocks * grid.key_blocks if kind == BLOCK_SPARSE else 0

    def pattern(self, call: PrefillCall, evidence: Evidence, sizes: Sizes) -> Pattern:
        """The patterns of some heads, all of the kind that the evidence is for."""
        if isinstance(evidence, tuple):
            return vertical_slash(evidence, sizes, sink=self.sink, window=self.window, block=self.block)
        if evidence is not None:
            return block_sparse(evidence, sizes, block_grid(call, self.block))
        return a_shape(sizes, length=len(call.key), block=self.block)

    @cached_property
    def _tuned(self) -> HeadPatterns | None:
        return HeadPatterns.load(self.tuned) if self.tuned else None


def _sizes(heads: Sequence[HeadPattern], device: torch.device) -> Sizes:
    return Sizes(
        *(torch.tensor([getattr(head, name) for head in heads], device=device) for name in Sizes._fields)
    )
