"""The seam between a Hugging Face model and cache, selection and kernels.

transformers hands every attention call of a model to one function. Ours writes the new keys and values into the paged
cache and lets the step's *attend* strategy answer: dense, dense with exported scores, or sparse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from specattn.accounting import PrefillMeter, ReadMeter
from specattn.cache import PagedKVCache, Segment
from specattn.draft_attention import DraftAttention
from specattn.kernels.dense_attention import attention_logits, dense_attention, weighted_values
from specattn.kernels.sparse_attention import sparse_attention, trim
from specattn.prefill.base import PrefillCall, PrefillMethod
from specattn.selection.base import LayerState, Method, RoundState, Selection
from specattn.stores.base import SideStore, StoreSpec
from specattn.stores.quantised_keys import quantised_keys_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "specattn"


@dataclass(frozen=True)
class LayerCall:
    """One attention call: a layer's queries with what they are scaled by and may see."""

    layer: int
    query: Tensor  # [batch, rows, query_heads, head_dim]
    scaling: float
    window: int | None


class Attend(Protocol):
    """How a step answers an attention call, after its keys and values were cached."""

    def __call__(self, step: Step, call: LayerCall) -> Tensor:
        """Attention output ``[batch, rows, query_heads, head_dim]``."""
        ...


@dataclass(frozen=True)
class Step:
    """One forward pass of one model: who is in the batch, where their rows stand, how attention is answered.

    Attributes:
        slots: int64 ``[batch]``, cache slots.
        starts: position of each request's first row, as the host knows them.
        positions: int64 ``[batch, rows]``, on the device: places in the cache, which is shorter than the text where
            tokens were evicted.
        text_positions: int64 ``[batch, rows]``, the same in the text: what position embeddings are made of.
        pool_rows: int64 ``[batch, rows]``, the cache rows that the new tokens take.
        rows: how many rows of each request are its own, if not all: the others repeat the last of them.
        meter: where the bytes read are counted; ``None`` for passes that do not count.
    """

    cache: PagedKVCache
    slots: Tensor
    host_slots: list[int]
    starts: list[int]
    positions: Tensor
    text_positions: Tensor
    pool_rows: Tensor
    attend: Attend
    meter: ReadMeter | None = None
    rows: list[int] | None = None

    def row_count(self, request: int) -> int:
        """The rows of ``request`` that are its own."""
        return self.positions.shape[1] if self.rows is None else self.rows[request]

    def segments(self, layer: int, request: int, window: int | None) -> tuple[list[Segment], int]:
        """What ``request`` can see in ``layer``, and the position of its first token."""
        start = self.starts[request]
        first = 0 if window is None else max(0, start - window + 1)
        stop = start + self.row_count(request)
        return self.cache.segments(layer, self.host_slots[request], first, stop), first

    def pool_rows_from(self, request: int, first: int) -> Tensor:
        """The pool rows of what ``request`` can see from the position ``first`` on."""
        stop = self.starts[request] + self.row_count(request)
        tokens = torch.arange(first, stop, device=self.slots.device)
        return self.cache.rows(self.slots[request, None], tokens[None])[0]


_current: ContextVar[Step] = ContextVar("specattn_step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make ``step`` the one that the attention calls of a forward pass belong to."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def attached(*models: PreTrainedModel | None) -> Iterator[None]:
    """Route the attention of ``models`` through specattn, and put everything back on the way out."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    before: list[tuple[PreTrainedModel, str]] = []
    try:
        for model in models:
            if model is not None:
                before.append((model, model.config._attn_implementation))
                model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        for model, implementation in reversed(before):
            model.set_attn_implementation(implementation)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: ``query`` ``[batch, heads, rows, head_dim]``, new ``key`` and ``value``."""
    step = _current.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    step.cache.append(layer, step.slots, step.positions, step.pool_rows, key, value)
    call = LayerCall(layer, query.transpose(1, 2), scaling or query.shape[-1] ** -0.5, sliding_window)
    return step.attend(step, call), None


class DenseAttend:
    """Everything visible is read."""

    def __call__(self, step: Step, call: LayerCall) -> Tensor:
        if step.meter is not None:
            self.count(step, call, step.meter)
        outs = [self.attend_request(step, call, request) for request in range(len(step.starts))]
        return torch.stack(
            outs if step.rows is None else [_repeat_last(out, call.query.shape[1]) for out in outs]
        )

    def count(self, step: Step, call: LayerCall, meter: ReadMeter) -> None:
        """Count the bytes that the call reads."""
        meter.add_dense(step.slots, step.positions, call.window, step.text_positions)

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        """``[rows, query_heads, head_dim]`` for one request of the batch."""
        segments, first = step.segments(call.layer, request, call.window)
        query = call.query[request, : step.row_count(request)]
        return dense_attention(query, segments, step.starts[request], first, call.scaling, call.window)


def _repeat_last(out: Tensor, rows: int) -> Tensor:
    """``out`` ``[n, ...]``, its last row repeated up to ``rows`` rows."""
    return torch.cat([out, out[-1:].expand(rows - out.shape[0], *out.shape[1:])])


class PrefillAttend(DenseAttend):
    """The rows of a prompt by a prefill method; sliding-window layers stay as they are."""

    def __init__(self, method: PrefillMethod, meter: PrefillMeter) -> None:
        self.method, self.prefill_meter = method, meter

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        if call.window is not None:
            return super().attend_request(step, call, request)
        segments, _ = step.segments(call.layer, request, None)
        key, value = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*segments, strict=True)
        )
        start = step.starts[request]
        output = self.method.attention(
            PrefillCall(call.layer, call.query[request], key, value, start, call.scaling)
        )
        self.prefill_meter.add(step.host_slots[request], start, key.shape[0] - start, output.computed)
        return output.out


class ExportAttend(DenseAttend):
    """Dense, and the last ``rows`` rows of each request are kept in ``export`` from row ``first_row`` on.

    Where the cache has quantised keys, what is kept is made from them, as :mod:`specattn.fast.sparse_draft` does.
    """

    def __init__(self, export: DraftAttention, first_row: int, rows: int) -> None:
        self.export, self.first_row, self.rows = export, first_row, rows

    def attend_request(self, step: Step, call: LayerCall, request: int) -> Tensor:
        if not self.export.wants(call.layer):
            return super().attend_request(step, call, request)
        segments, first = step.segments(call.layer, request, call.window)
        query = call.query[request]
        where = (step.starts[request], first, call.scaling, call.window)
        logits = attention_logits(query, segments, *where)
        probabilities = exported = logits.softmax(-1)
        if copy := quantised_keys_of(step.cache):
            keys = copy.layers[call.layer].dequantise(step.pool_rows_from(request, first))
            scores = attention_logits(query, [(keys, keys)], *where)
            exported = (scores - logits.logsumexp(-1, keepdim=True)).exp().clamp(max=1)
        self.export.record(call.layer, request, self.first_row, first, exported[:, -self.rows :])
        return weighted_values(probabilities, segments).to(query.dtype)


class SelectionObserver(Protocol):
    """Looks at a sparse layer's selection and output beside the exact attention: for audits and evaluation."""

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None: ...


class SparseAttend:
    """Only what ``method`` selects is read; its dense layers and sliding-window layers stay as they are."""

    def __init__(
        self, method: Method, state: RoundState, observers: Sequence[SelectionObserver] = ()
    ) -> None:
        self.method, self.state, self.observers = method, state, observers
        self.dense = DenseAttend()

    @cached_property
    def prepared(self) -> object:
        """What the method does once a round; by now the pass has begun, and its tokens are known."""
        return self.method.prepare(self.state)

    def __call__(self, step: Step, call: LayerCall) -> Tensor:
        if call.window is not None or self.method.is_dense(call.layer):
            return self.dense(step, call)
        layer_state = LayerState(
            self.state, self.prepared, call.layer, call.query, call.scaling, StepSource(step)
        )
        selection = trim(self.method.select(layer_state))
        if step.meter is not None:
            step.meter.add_selection(step.slots, step.positions, selection)
        keys, values = step.cache.gather(call.layer, step.slots, selection.indices)
        output = sparse_attention(call.query, keys, values, selection, step.positions, call.scaling)
        for observer in self.observers:
            observer(step, call, selection, output)
        return output


class StepSource:
    """The keys and values that a step's requests can see, for methods that score them themselves."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def keys(self, layer: int) -> list[Tensor]:
        """Keys ``[length, kv_heads, head_dim]`` of each request; a copy only where the pool splits them."""
        result = []
        for request in range(len(self.step.starts)):
            segments, _ = self.step.segments(layer, request, None)
            parts = [key for key, _ in segments]
            result.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return result

    def gather(self, layer: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, n, head_dim]`` of the tokens ``indices``."""
        return self.step.cache.gather(layer, self.step.slots, indices)

    def rows(self, positions: Tensor) -> Tensor:
        """Pool rows of the token ``positions`` ``[batch, ...]``."""
        return self.step.cache.rows(self.step.slots, positions)

    def store(self, spec: StoreSpec) -> SideStore:
        """The cache's side store of this kind."""
        return self.step.cache.stores[spec]
