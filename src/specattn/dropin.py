"""Sparse attention inside transformers' own ``generate``, for methods that need no draft.

The model keeps the cache that ``generate`` gives it. Prefill is dense; a decoding step selects tokens and reads only
those. The keys lie in one tensor here, so selection is exact but nothing is paged, and what a method wants kept beside
the keys is worked out anew in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specattn.contiguous import ContiguousSource
from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels import sparse_attention as kernel
from specattn.pairs.checks import check_config, check_modules
from specattn.selection.base import LayerState, Method, Need, RoundState
from specattn.selection.eviction import Evicting
from specattn.selection.registry import parse_method
from specattn.stores.base import pool_page

IMPLEMENTATION = "specattn_dropin"
MOST_ROWS = 32
"""Passes with more new tokens than this are prefill, and so are those that begin a request."""


@contextmanager
def sparse_attention(
    model: PreTrainedModel, method: Method | str, **options: Any
) -> Iterator[PreTrainedModel]:
    """Let ``model`` decode with ``method`` inside the block: ``model.generate(...)`` works as ever.

    Args:
        model: a transformers causal language model.
        method: a method that needs no draft, or its name (options as keywords or as ``name:option=value``).

    Raises:
        UsageError: if the method needs a draft or evicts, its name or options are unknown, or the model's attention
            is not supported.
    """
    if isinstance(method, str):
        method = parse_method(method, **options)
    elif options:
        raise UsageError(f"options {', '.join(options)} go with a method's name, not with a method object")
    if Need.DRAFT in method.needs:
        raise UsageError(
            f"method {method.name!r} reads where a draft model looks; use specattn.generate with a pair, "
            "or a method that needs no draft: dense, streaming, oracle"
        )
    if Need.SCORES in method.needs:
        raise UsageError(
            f"method {method.name!r} reads where dense passes looked, and here every pass is sparse; use "
            f"specattn.generate with method={method.name!r} and lossless, or another method: streaming, quest"
        )
    if isinstance(method, Evicting):
        raise UsageError(
            f"method {method.name!r} drops tokens from the KV cache, which here belongs to transformers; use "
            f"specattn.generate with method={method.name!r}, or a method that only selects: streaming, topk, oracle"
        )
    pool_page(method.stores)
    name = model.config._name_or_path or model.config.model_type
    check_config(model.config, name)
    check_modules(model, name)
    dropin = _DropIn(method, KVGeometry.from_config(model.config, model.dtype))
    before = model.config._attn_implementation
    # generate compiles decoding with a static cache; selection asks the device for counts and stays as it is.
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(_forward))
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    outer = [vars(module).get("_specattn") for module in modules]  # of a block around this one
    try:
        for module in modules:
            module._specattn = dropin  # type: ignore[assignment]
        model.set_attn_implementation(IMPLEMENTATION)
        yield model
    finally:
        model.set_attn_implementation(before)
        for module, previous in zip(modules, outer, strict=True):
            if previous is None:
                vars(module).pop("_specattn", None)
            else:
                module._specattn = previous


@dataclass
class _DropIn:
    """The method at work in one model, and what it prepared for the present step."""

    method: Method
    geometry: KVGeometry
    round: RoundState | None = None
    prepared: object = field(default=None)

    def attend(self, layer: int, query: Tensor, source: ContiguousSource, scaling: float) -> Tensor:
        """``query`` ``[batch, heads, rows, head_dim]``: output ``[batch, rows, heads, head_dim]``."""
        queries = query.transpose(1, 2)
        self._begin(layer, source, queries)
        assert self.round is not None
        state = LayerState(self.round, self.prepared, layer, queries, scaling, source)
        selection = kernel.trim(self.method.select(state))
        positions = self.round.starts[:, None] + torch.arange(self.round.rows, device=query.device)
        keys, values = source.gather(layer, selection.indices)
        return kernel.sparse_attention(queries, keys, values, selection, positions, scaling)

    def _begin(self, layer: int, source: ContiguousSource, queries: Tensor) -> None:
        """Prepare the round at its first sparse layer."""
        if layer > self._first_layer and self.round is not None:
            return
        self._first_layer = layer
        geometry = self.geometry
        self.round = RoundState(
            starts=(source.lengths - queries.shape[1]).int(),
            rows=queries.shape[1],
            max_length=source.columns,
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            query_heads=geometry.query_heads,
        )
        self.prepared = self.method.prepare(self.round)

    _first_layer: int = 1 << 30


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls; sliding-window layers and prefill stay as they are."""
    dropin: _DropIn = module._specattn  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    prefill = _is_prefill(query.shape[2], key.shape[2], attention_mask)
    if prefill or options.get("sliding_window") is not None or dropin.method.is_dense(layer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    source = ContiguousSource.of(layer, key, value, attention_mask)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return dropin.attend(layer, query, source, scaling), None


def _is_prefill(rows: int, columns: int, mask: Tensor | None) -> bool:
    """Whether a pass has many new tokens, or the first of a request: a static cache then has more columns than rows."""
    if rows == columns or rows > MOST_ROWS:
        return True
    if mask is None:  # transformers leaves it out for a single row, and for the rows of an empty static cache
        return rows > 1
    return bool((mask[:, 0, 0].sum(-1) <= 1).any())
