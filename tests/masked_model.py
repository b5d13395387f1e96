"""A sparse target written another way: transformers' eager attention under masks, the whole text in one pass."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.selection.specattn import SpecAttn


def round_spans(prefix: int, context: int, gamma: int) -> list[tuple[int, int]]:
    """First row and number of rows of each round."""
    return [(start, min(gamma + 1, context - start)) for start in range(prefix, context, gamma + 1)]


def causal(length: int, window: int | None = None) -> Tensor:
    """Boolean ``[1, length, length]``: what a dense layer sees."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    return ((column <= row) & (column > row - (window or length)))[None]


def masked_logits(model: PreTrainedModel, tokens: list[int], masks: list[Tensor]) -> Tensor:
    """Logits ``[length, vocab]`` if layer i sees what ``masks[i]`` ``[heads or 1, length, length]`` lets it see."""
    return masked_pass(model, tokens, masks)[0]


def masked_pass(model: PreTrainedModel, tokens: list[int], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, and the attention ``[layers, heads, length, length]`` under the masks."""
    before = model.config._attn_implementation
    hooks = [
        layer.self_attn.register_forward_pre_hook(_see(mask), with_kwargs=True)
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            output = model(torch.tensor([tokens]), output_attentions=True)
            return output.logits[0], torch.cat(output.attentions)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def _see(mask: Tensor):
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None]
    return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": bias})


def attention_weights(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """The model's own dense attention: ``[layers, heads, length, length]``."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return torch.cat(attentions)


def streaming_mask(length: int, spans: list[tuple[int, int]], budget: int, sink: int) -> Tensor:
    """Rows of a round see the sinks, the window that ends where the round begins, and their own tokens causally."""
    mask = causal(length)
    for start, count in spans:
        for row in range(start, start + count):
            seen = {*range(sink), *range(start - (budget - sink), row + 1)}
            mask[0, row] = False
            mask[0, row, sorted(seen)] = True
    return mask


def mixture_mask(
    length: int, spans: list[tuple[int, int]], draft: Tensor, weights: Tensor, group: int, method: SpecAttn
) -> Tensor:
    """Rows of a round see the nucleus of their KV head's mixture of draft heads.

    Args:
        draft: the draft's attention ``[draft heads, length, length]``; a round of ``count`` rows has its first
            ``count - 1`` rows, and is dense if that is none.
        weights: ``[kv_heads, draft heads]``.
        group: query heads of a KV head.
    """
    mask = causal(length).repeat(len(weights) * group, 1, 1)
    for (start, count), kv_head in itertools.product(spans, range(len(weights))):
        if count == 1:
            continue
        stop = start + count
        mixed = weights[kv_head] @ draft[:, start : stop - 1, :stop].mean(1)
        seen = {*range(method.sink), *range(start - method.window, stop)}
        for token in mixed.argsort(descending=True).tolist():
            if float(mixed[sorted(seen)].sum()) >= method.p:
                break
            seen.add(token)
        listed = torch.zeros(length, dtype=torch.bool)
        listed[sorted(seen)] = True
        mask[kv_head * group : (kv_head + 1) * group, start:stop] &= listed
    return mask
