"""MInference's offline search (arXiv 2407.02490, section 3.2): the pattern that serves each head best for its cost.

Every candidate is first grown until it computes the same share of the causal products, tiles counted as a kernel
computes them; then the one whose output is nearest to dense attention wins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import specattn
from specattn.attention import DenseAttend, LayerCall, Step, attached
from specattn.errors import UsageError
from specattn.mapping.identity import config_hash, describe
from specattn.pairs import Pair
from specattn.prefill.base import PrefillCall
from specattn.prefill.head_patterns import HeadPattern, HeadPatterns
from specattn.prefill.minference import MInference
from specattn.prefill.patterns import Pattern, causal_products
from specattn.prefill.shapes import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH, Sizes
from specattn.runner import ModelRunner
from specattn.selection.checks import check_probability
from specattn.text import required_tokens

Progress = Callable[[str, int], None]
"""Called with ``layers`` and how many of a text were just searched."""

STEPS = 12
"""Bisections of a shape's size: to a 4096th of the length."""


@dataclass(frozen=True)
class Shape:
    """A candidate: a kind, and the numbers of its vertical and slash lines at scale 1, in lengths of the text."""

    kind: str
    vertical: float = 0.0
    slash: float = 0.0
    blocks: float = 0.0

    def sizes(self, scale: Tensor, length: int, block: int) -> Sizes:
        """Sizes at ``scale`` ``[heads]``."""
        blocks = -(-length // block)
        whole = (self.vertical * length, self.slash * length, self.blocks * blocks)
        return Sizes(*((scale * size).round().long() for size in whole))


SHAPES = (
    Shape(A_SHAPE, 0.25, 1),
    Shape(VERTICAL_SLASH, 30 / 800, 1),
    Shape(VERTICAL_SLASH, 1000 / 6096, 1),
    Shape(VERTICAL_SLASH, 500 / 700, 1),
    Shape(VERTICAL_SLASH, 1, 100 / 3500),
    Shape(BLOCK_SPARSE, blocks=1),
)
"""What is tried for each head: sink and window as 1,024 to 4,096, lines as in the released configurations, blocks."""


class ShapeSearch(DenseAttend):
    """Dense attention that also tries every shape on the heads of the layers that it passes.

    Attributes:
        errors, scales: for each layer, float64 ``[shapes, heads]``: relative error of a head's output, infinite
            where even the smallest size is beyond the budget, and the scale at which the shape keeps within it.
    """

    def __init__(self, method: MInference, budget: float, progress: Progress | None = None) -> None:
        self.method, self.budget, self.progress = method, budget, progress
        self.errors: dict[int, Tensor] = {}
        self.scales: dict[int, Tensor] = {}

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        out = super().attend_request(step, call, request)
        if call.window is None:
            segments, _ = step.segments(call.layer, request, None)
            key, value = (torch.cat(parts) for parts in zip(*segments, strict=True))
            query, start = call.query[request], step.starts[request]
            self.search(PrefillCall(call.layer, query, key, value, start, call.scaling), out)
        if self.progress is not None:
            self.progress("layers", 1)
        return out

    def search(self, call: PrefillCall, dense: Tensor) -> None:
        """Try the shapes on a layer whose exact output is ``dense``."""
        heads = range(call.query.shape[1])
        evidence = {shape.kind: self.method.evidence(call, shape.kind, heads) for shape in SHAPES}
        errors, scales = [], []
        for shape in SHAPES:

            def pattern(scale: Tensor, shape: Shape = shape) -> Pattern:
                sizes = shape.sizes(scale, len(call.key), self.method.block)
                return self.method.pattern(call, evidence[shape.kind], sizes)

            scale, fits = self._fit(call, pattern)
            error = _errors(pattern(scale).attention(call, heads), dense)
            scales.append(scale)
            errors.append(torch.where(fits, error, torch.inf))
        self.errors[call.layer], self.scales[call.layer] = torch.stack(errors), torch.stack(scales)

    def _fit(self, call: PrefillCall, pattern: Callable[[Tensor], Pattern]) -> tuple[Tensor, Tensor]:
        """The largest scale of each head at which its pattern keeps within the budget, and whether there is any."""
        rows, heads, _ = call.query.shape
        allowed = self.budget * causal_products(call.start, rows)
        low = torch.zeros(heads, dtype=torch.float64, device=call.query.device)
        fits, high = pattern(low).products(call) <= allowed, torch.ones_like(low)
        for _ in range(STEPS):
            middle = (low + high) / 2
            small = pattern(middle).products(call) <= allowed
            low, high = torch.where(small, middle, low), torch.where(small, high, middle)
        return low, fits


def choose_patterns(
    pair: Pair,
    texts: Sequence[str | Sequence[int]],
    *,
    tokens: int = 8192,
    budget: float = 0.3,
    progress: Progress | None = None,
) -> HeadPatterns:
    """Choose a pattern and its size for each head of a pair's target.

    Args:
        pair: only its target and tokenizer are used.
        texts: what to choose on, as text or token ids: the like of what will be served, and as long.
        tokens: how much of each text is read, in one pass.
        budget: share of the causal products that each head may compute. The paper's, as much as a sink of 1,024 and
            a window of 4,096 tokens compute in a text of 30,000, is .31.

    Raises:
        UsageError: if a text is too short or a figure out of range, before any work.
    """
    method = MInference()
    check_budget(budget, tokens)
    if tokens > pair.context_limit:
        raise UsageError(
            f"tokens={tokens:,} is above {pair.context_limit:,}, the target's context; use fewer"
        )
    tokenized = [required_tokens(pair.tokenizer, number, text, tokens) for number, text in enumerate(texts)]
    if not tokenized:
        raise UsageError("no text to choose patterns on; give at least one")
    searches = [_search(pair, ids, ShapeSearch(method, budget, progress)) for ids in tokenized]
    layers: list[tuple[HeadPattern, ...]] = []
    least = []
    for layer in range(pair.target.config.get_text_config().num_hidden_layers):
        if layer not in searches[0].errors:  # a sliding window: read as it is
            layers.append(())
            continue
        error = torch.stack([search.errors[layer] for search in searches]).mean(0)
        scale = torch.stack([search.scales[layer] for search in searches]).mean(0)
        layers.append(_heads(error.argmin(0).tolist(), scale, tokens, method.block))
        least.append(error.amin(0))
    return HeadPatterns(
        layers=tuple(layers),
        target=describe(pair.target.config),
        target_hash=config_hash(pair.target.config),
        text_hash=hashlib.sha256(json.dumps(tokenized).encode()).hexdigest(),
        tokens=tokens,
        budget=budget,
        error=float(torch.stack(least).mean()) if least else 0.0,
        specattn=specattn.__version__,
    )


def check_budget(budget: float, tokens: int) -> None:
    """Refuse a share of the causal products over ``tokens`` tokens that no pattern can keep within.

    Raises:
        UsageError: if it is outside (0, 1], or less than every pattern computes.
    """
    check_probability("tune minference", "budget", budget)
    if tokens < 1:
        raise UsageError(f"tokens={tokens} is below 1")
    block = MInference.block
    own = sum(causal_products(0, min(block, tokens - first)) for first in range(0, tokens, block))
    least = own / causal_products(0, tokens)
    if budget < least:
        raise UsageError(
            f"budget={budget} is below {least:.3f}, what the rows' own blocks of {block} take in {tokens:,} tokens; "
            "allow more, or use more tokens"
        )


def _search(pair: Pair, ids: Sequence[int], search: ShapeSearch) -> ShapeSearch:
    """Pass a text through the target."""
    with attached(pair.target):
        runner = ModelRunner(pair.target, tokens=len(ids), slots=1)
        runner.prefill(runner.cache.allocate(len(ids)), ids, chunk=len(ids), attend=search)
    return search


def _heads(best: Sequence[int], scale: Tensor, length: int, block: int) -> tuple[HeadPattern, ...]:
    """The patterns of a layer: for each head its best shape, at that shape's ``scale`` ``[shapes, heads]``."""
    heads = []
    for head, number in enumerate(best):
        sizes = SHAPES[number].sizes(scale[number, head], length, block)
        heads.append(HeadPattern(SHAPES[number].kind, *(int(size) for size in sizes)))
    return tuple(heads)


def _errors(out: Tensor, dense: Tensor) -> Tensor:
    """Relative error of each head's output ``[rows, heads, head_dim]``: float64 ``[heads]``."""
    difference, exact = (out - dense).double().norm(dim=(0, 2)), dense.double().norm(dim=(0, 2))
    return difference / exact.clamp(min=torch.finfo(torch.float64).tiny)
