"""The eviction papers read word by word: loops over heads and tokens, and a masked model for what is forgotten."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from masked_model import attention_weights, causal, masked_pass
from torch import Tensor
from transformers import PreTrainedModel

Kept = dict[tuple[int, int], list[int]]
"""By layer and KV head: the positions of the tokens that are left, ascending."""


def windows(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    return list(itertools.product(range(model.config.num_hidden_layers), range(kv_heads(model))))


def kv_heads(model: PreTrainedModel) -> int:
    return model.config.num_key_value_heads


def group(model: PreTrainedModel) -> int:
    return model.config.num_attention_heads // kv_heads(model)


def largest(scores: dict[int, float], count: int) -> list[int]:
    """The ``count`` positions with the largest scores; of equal ones the most recent."""
    return sorted(scores, key=lambda token: (scores[token], token), reverse=True)[:count]


def snapkv(
    model: PreTrainedModel,
    prompt: list[int],
    *,
    budget: int,
    window: int,
    kernel: int,
    pooling: str,
    gqa: str,
) -> Kept:
    """What is left of a prompt: pooled votes of the window's queries for each token before it."""
    weights = attention_weights(model, prompt)
    before = len(prompt) - window
    kept: Kept = {}
    for layer, head in heads(model):
        scores = dict.fromkeys(range(before), 0.0)
        for token in range(before):
            votes = []
            for query_head in range(head * group(model), (head + 1) * group(model)):
                near = range(token - kernel // 2, token + kernel // 2 + 1)
                sums = [float(weights[layer, query_head, before:, t].sum()) for t in near if 0 <= t < before]
                votes.append(max(sums) if pooling == "max" else sum(sums) / kernel)
            scores[token] = max(votes) if gqa == "max" else sum(votes) / len(votes)
        kept[layer, head] = sorted(largest(scores, budget - window)) + list(range(before, len(prompt)))
    return kept


@dataclass
class Forgetful:
    """A model that sees of a text what is left of it: rows of the prompt see all, later rows what is kept then."""

    model: PreTrainedModel
    tokens: list[int]
    masks: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        length, heads = len(self.tokens), self.model.config.num_attention_heads
        self.masks = [causal(length, window).repeat(heads, 1, 1) for window in windows(self.model)]

    def see(self, start: int, count: int, kept: Kept) -> None:
        """Let ``count`` rows from ``start`` on see the kept tokens and each other; sliding windows stay."""
        for (layer, head), tokens in kept.items():
            if windows(self.model)[layer] is None:
                columns = sorted({*tokens, *range(start, start + count)})
                listed = torch.zeros(len(self.tokens), dtype=torch.bool)
                listed[columns] = True
                queries = slice(head * group(self.model), (head + 1) * group(self.model))
                self.masks[layer][queries, start : start + count] &= listed

    def run(self, length: int) -> tuple[Tensor, Tensor]:
        """Logits and attention weights of the first ``length`` tokens."""
        return masked_pass(
            self.model, self.tokens[:length], [mask[:, :length, :length] for mask in self.masks]
        )


@dataclass
class H2OReading:
    """The paper's algorithm over a text whose first tokens are a prompt and whose others come in rounds."""

    model: PreTrainedModel
    budget: float
    heavy: float
    every: int = 1
    kept: Kept = field(init=False)
    scores: dict[tuple[int, int], dict[int, float]] = field(init=False)
    masks: list[Tensor] = field(init=False)

    def read(self, tokens: list[int], prompt: int, rounds: list[int]) -> Tensor:
        """Logits ``[length, vocab]`` of the text, ``rounds`` being the tokens of each round after the prompt."""
        model = Forgetful(self.model, tokens)
        self.masks = model.masks
        self.kept = {key: [] for key in heads(self.model)}
        self.scores = {key: {} for key in heads(self.model)}
        self._take(model.run(prompt)[1], 0, prompt, spare=0)
        start = prompt
        for count in rounds:
            model.see(start, count, self.kept)
            self._take(model.run(start + count)[1], start, count, spare=self.every - 1)
            start += count
        return model.run(start)[0]

    def _take(self, weights: Tensor, start: int, count: int, *, spare: int) -> None:
        for layer, head in heads(self.model):
            kept, scores = self.kept[layer, head], self.scores[layer, head]
            kept += range(start, start + count)
            for token in kept:
                rows = weights[
                    layer, head * group(self.model) : (head + 1) * group(self.model), start:, token
                ]
                scores[token] = scores.get(token, 0.0) + float(rows.sum()) / group(self.model)
            context = start + count
            limit = -int(-self.budget * context // 1) if self.budget <= 1 else int(self.budget)
            limit = max(limit, *(window or 0 for window in windows(self.model)), 0)
            if len(kept) > limit + spare:
                self._evict(kept, scores, limit)

    def _evict(self, kept: list[int], scores: dict[int, float], limit: int) -> None:
        recent = limit - round(self.heavy * limit)
        old = {token: scores[token] for token in kept[: len(kept) - recent]}
        kept[:] = sorted(largest(old, limit - recent)) + kept[len(kept) - recent :]
        for token in set(scores) - set(kept):
            del scores[token]
