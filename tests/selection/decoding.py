"""Decoding a known text in rounds of known sizes, with the parts of the engine and nothing around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.attention import attached
from specattn.runner import ModelRunner
from specattn.selection.registry import parse_method
from specattn.speculation import Speculator


@dataclass
class Decoded:
    """``logits`` ``[rows, vocab]``: the prompt's last row, then the rounds' rows."""

    logits: Tensor
    speculator: Speculator
    slot: int

    @property
    def cache(self):
        return self.speculator.target.cache


def decode(
    model: PreTrainedModel, method: str, tokens: list[int], prompt: int, rounds: list[int], rejected: int = 0
) -> Decoded:
    """Each round has ``rejected`` more rows, of other tokens, that are taken back."""
    room = len(tokens) + rejected
    runner = ModelRunner(model, tokens=2 * room, slots=2)
    runner.cache.allocate(room)
    slot = runner.cache.allocate(room)
    speculator = Speculator(runner, None, parse_method(method), None, model.config.vocab_size)
    start = prompt
    with attached(model), torch.inference_mode():
        logits = [speculator.prefill(slot, tokens[:prompt])[None]]
        for count in rounds:
            attend = speculator.sparse_attend([slot], [start], count + rejected, None)
            step = runner.step([slot], [start], count + rejected, attend)
            row = tokens[start : start + count] + [5 + i for i in range(rejected)]
            logits.append(runner.forward(step, torch.tensor([row]), len(row))[0, :count])
            start += count
            speculator.commit(slot, start)
    return Decoded(torch.cat(logits), speculator, slot)
