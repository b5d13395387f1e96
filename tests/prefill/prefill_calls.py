"""Attention calls for the tests of prefill methods, and what attention over a mask is, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.prefill.base import PrefillCall

SCALING = 0.35


def random_call(rows: int, start: int, query_heads: int, kv_heads: int, head_dim: int = 16) -> PrefillCall:
    """Random queries, keys and values of layer 0."""
    query = torch.randn(rows, query_heads, head_dim)
    key, value = torch.randn(2, start + rows, kv_heads, head_dim)
    return PrefillCall(0, query, key, value, start, SCALING)


def revealing_call(rows: int, start: int, query_heads: int, kv_heads: int) -> PrefillCall:
    """A call whose output *is* the attention: the value of a key is its number, one-hot."""
    length = start + rows
    call = random_call(rows, start, query_heads, kv_heads, head_dim=length)
    value = torch.eye(length)[:, None].expand(-1, kv_heads, -1).contiguous()
    return PrefillCall(0, call.query, call.key, value, start, length**-0.5)


def owner(call: PrefillCall, head: int) -> int:
    """The KV head of a query head."""
    return head // (call.query.shape[1] // call.key.shape[1])


def causal_logits(call: PrefillCall, head: int) -> Tensor:
    """float64 ``[rows, length]``, minus infinity in the future."""
    logits = call.query[:, head].double() @ call.key[:, owner(call, head)].double().T * call.scaling
    for row in range(len(logits)):
        logits[row, call.start + row + 1 :] = float("-inf")
    return logits


def masked_attention(call: PrefillCall, head: int, mask: Tensor) -> Tensor:
    """One head's attention over the keys that ``mask`` ``[rows, length]`` leaves: float64 ``[rows, head_dim]``."""
    weights = causal_logits(call, head).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ call.value[:, owner(call, head)].double()


def causal_total(call: PrefillCall) -> int:
    """Causal query-key products of all heads."""
    rows, heads, _ = call.query.shape
    return heads * sum(call.start + row + 1 for row in range(rows))
