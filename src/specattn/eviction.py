"""Dropping tokens of the target's cache for good, as an evicting method decides.

A prompt is read as ever, and while its last tokens are read, what they attend to is noted; then the cache is cut. A
method that goes on observes every round and counts the rows that were accepted. All layers and KV heads keep equally
many tokens, each its own, so that a cut cache is an ordinary, shorter one. A sliding-window layer keeps its most
recent tokens, and no layer fewer than such a window, so that it sees what it always sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.accounting import ReadMeter
from specattn.attention import Attend, DenseAttend, LayerCall, Step
from specattn.kernels.dense_attention import attention_probabilities
from specattn.kernels.received_attention import received_attention
from specattn.prefill.base import PrefillMethod
from specattn.runner import ModelRunner, Progress
from specattn.selection.base import Selection
from specattn.selection.eviction import Evicting


@dataclass
class Scores:
    """What the tokens that a slot holds have got so far.

    Attributes:
        layers: float32 ``[kv_heads, held]`` by the layer's number; layers with a sliding window have none.
        rows: of the present round, ``[kv_heads, rows, held + rows]``: which of them count is not known yet.
        window: the largest sliding window of the model's layers.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    window: int = 0

    def add(self, layer: int, scores: Tensor) -> None:
        """Add ``scores`` ``[kv_heads, length]``, which may reach beyond the tokens known before."""
        before = self.layers.get(layer)
        if before is not None:
            scores = scores + pad(before, (0, scores.shape[-1] - before.shape[-1]))
        self.layers[layer] = scores


class Eviction:
    """Keeps the requests of ``target`` within the budget of ``method``.

    Attributes:
        attend: how the target's pass of a round answers attention calls.
        scores: of the slots whose tokens may go on being dropped.
    """

    def __init__(self, method: Evicting, target: ModelRunner) -> None:
        self.method, self.target = method, target
        self.scores: dict[int, Scores] = {}
        self.attend: Attend = _RoundAttend(method, self.scores) if method.accumulates else DenseAttend()

    def prefill(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        method: PrefillMethod | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read what ``slot`` does not hold yet of ``prompt``, and drop what the method does not keep of it.

        The slot may hold the first tokens of the prompt already, but none that is to be observed.

        Args:
            method: how the tokens that need not be observed are read.

        Returns:
            The last token's logits ``[vocab]``.
        """
        split = len(prompt) - self.method.observed(len(prompt))
        ahead, observed = prompt[self.target.cache.length(slot) : split], prompt[split:]
        if ahead:
            logits = self.target.prefill(slot, ahead, method=method, progress=progress)
        if observed:
            scores = self.scores[slot] = Scores()
            # Scores that do not add up come from one pass.
            chunk = None if self.method.accumulates else len(observed)
            observe = _PromptAttend(self.method, scores)
            logits = self.target.prefill(slot, observed, chunk=chunk, attend=observe, progress=progress)
            self._evict(slot, spare=0)
            if not self.method.accumulates:
                del self.scores[slot]
        return logits

    def after_round(self, slot: int, rows: int) -> None:
        """Count the first ``rows`` rows of the round that ``slot`` has had, and drop what is too much by now."""
        if not self.method.accumulates:
            return
        scores, held = self.scores[slot], self.target.cache.length(slot)
        for layer, received in scores.rows.items():
            scores.add(layer, received[:, :rows, :held].sum(1))
        scores.rows.clear()
        self._evict(slot, self.method.spare)

    def _evict(self, slot: int, spare: int) -> None:
        cache, scores = self.target.cache, self.scores[slot]
        held = cache.length(slot)
        count = max(self.method.limit(cache.position(slot)), scores.window)
        if held <= count + spare:
            return
        recent = torch.arange(held - count, held, device=self.target.device)
        kept = [recent.expand(cache.geometry.kv_heads, -1)] * cache.geometry.layers
        for layer, received in scores.layers.items():
            mask = self.method.keep(received, count)
            kept[layer] = Selection.from_mask(mask[None]).indices[0, :, :count].long()
            scores.layers[layer] = received.gather(1, kept[layer])
        cache.compact(slot, torch.stack(kept))


class _PromptAttend(DenseAttend):
    """Dense, and what the rows of one request attend to is added to its scores."""

    def __init__(self, method: Evicting, scores: Scores) -> None:
        self.method, self.scores = method, scores

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        if call.window is None:
            segments, _ = step.segments(call.layer, request, None)
            received = received_attention(call.query[request], segments, step.starts[request], call.scaling)
            self.scores.add(call.layer, self.method.score(received, segments[0][0].shape[1]))
        else:
            self.scores.window = max(self.scores.window, call.window)
        return super().attend_request(step, call, request)


class _RoundAttend(DenseAttend):
    """Dense, and what each row of a round attends to is kept until it is known which rows stand."""

    def __init__(self, method: Evicting, scores: dict[int, Scores]) -> None:
        self.method, self.scores = method, scores

    def count(self, step: Step, call: LayerCall, meter: ReadMeter) -> None:
        super().count(step, call, meter)
        if call.window is None:
            meter.add_scores(step.slots, step.positions)

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        if call.window is None:
            segments, _ = step.segments(call.layer, request, None)
            rows = attention_probabilities(
                call.query[request], segments, step.starts[request], 0, call.scaling
            )
            scores = self.method.score(rows, segments[0][0].shape[1])
            self.scores[step.host_slots[request]].rows[call.layer] = scores
        return super().attend_request(step, call, request)
