"""Greedy continuation of texts in timed rounds: what real models accept and select.

Reading a long text takes longer than all that is timed. So each text is read once, and its keys and values are copied
for the other requests of the batch, each of which begins some tokens earlier in it and so takes a way of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from specattn.attention import attached
from specattn.benchmarks.setting import Setting
from specattn.benchmarks.timing import Timer
from specattn.evaluation.documents import Document
from specattn.fast.round import FastRound
from specattn.runner import ModelRunner
from specattn.sampling import SamplingParams, SamplingState
from specattn.speculation import Batch

STRIDE = 64
"""Tokens between the places where two requests of one text begin, at most: a sixteenth of the context in all."""


@dataclass(frozen=True)
class Start:
    """Where a request begins: ``length`` tokens are in the caches, of which ``recent`` has the last and the next."""

    length: int
    recent: tuple[int, int]


@dataclass(frozen=True)
class Continuation:
    """What rounds of a batch were like.

    Attributes:
        ms: of a round on the device, the median.
        wall_ms: of a round for a host that waits for its tokens, the median.
        tokens_a_round: of one request, the mean.
        texts: how many different ones there were.
    """

    ms: float
    wall_ms: float
    tokens_a_round: float
    texts: int


@dataclass(frozen=True)
class Starts:
    """The requests of a batch and how many texts they are of."""

    requests: Sequence[Start]
    texts: int


def read_texts(setting: Setting, texts: Sequence[Document]) -> Starts:
    """Fill the caches of ``setting`` with ``texts``, each of ``setting.context + 1`` tokens."""
    used = texts[: setting.batch]
    with attached(*setting.pair.models):
        for runner in setting.runners:
            for slot, text in enumerate(used):
                runner.prefill(slot, text.tokens[: setting.context])
            for slot in range(len(used), setting.batch):
                _copy(runner, slot, slot % len(used), setting.context)
    copies = -(-setting.batch // len(used))
    stride = min(STRIDE, setting.context // 16 // copies)
    return Starts(
        [
            _start(used[slot % len(used)], setting.context - slot // len(used) * stride)
            for slot in range(setting.batch)
        ],
        len(used),
    )


def _copy(runner: ModelRunner, slot: int, source: int, length: int) -> None:
    geometry = runner.geometry
    tokens = torch.arange(length, device=runner.device).expand(geometry.layers, geometry.kv_heads, -1)
    runner.cache.copy(slot, runner.cache, source, tokens)


def _start(text: Document, length: int) -> Start:
    return Start(length, (text.tokens[length - 1], text.tokens[length]))


def continue_texts(setting: Setting, round: FastRound, starts: Starts, timer: Timer) -> Continuation:
    """Decode from ``starts`` with ``round``, greedily; its inputs are then those of the last round."""
    device = setting.target.runner.device
    run = timer.capture(round.run)
    sampling = SamplingState.of([SamplingParams()] * setting.batch, device)
    slots = list(range(setting.batch))
    lengths = [start.length for start in starts.requests]
    recent = [list(start.recent) for start in starts.requests]
    times, walls, produced = [], [], 0
    for number in range(timer.repeats):
        counter = torch.full((setting.batch,), number + 1, device=device)
        began = perf_counter()
        round.inputs.load(Batch(slots, lengths, torch.tensor(recent, device=device), counter, sampling))
        outcome, ms = timer.once(run)
        tokens, counts = outcome.tokens.tolist(), outcome.counts.tolist()
        walls.append(perf_counter() - began)
        times.append(ms)
        for request, (row, count) in enumerate(zip(tokens, counts, strict=True)):
            recent[request] = [*recent[request], *row[:count]][-2:]
            lengths[request] += count
        produced += sum(counts)
    rounds = timer.repeats * setting.batch
    return Continuation(median(times), 1e3 * median(walls), produced / rounds, starts.texts)
