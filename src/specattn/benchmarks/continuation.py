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

from specattn.attention import DenseAttend, attached
from specattn.benchmarks.setting import Setting
from specattn.benchmarks.timing import Timer
from specattn.evaluation.documents import Document
from specattn.fast.round import FastRound
from specattn.runner import ModelRunner

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
        agreement: share of the tokens that a dense pass over all of them chooses, too.
        texts: how many different ones there were.
    """

    ms: float
    wall_ms: float
    tokens_a_round: float
    agreement: float
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
    """Decode from ``starts`` with ``round``, greedily; its requests then stand behind the last round."""
    run = timer.capture(round.run)
    setting.place(round, [(start.length, *start.recent) for start in starts.requests])
    times, walls = [], []
    decoded: list[list[int]] = [[start.recent[1]] for start in starts.requests]
    for _ in range(timer.repeats):
        began = perf_counter()
        report, ms = timer.once(run)
        rows = report[:, : round.gamma + 2].tolist()
        walls.append(perf_counter() - began)
        times.append(ms)
        for tokens, row in zip(decoded, rows, strict=True):
            tokens += row[: row[-1]]
    produced = sum(len(tokens) - 1 for tokens in decoded) / (timer.repeats * setting.batch)
    agreement = _agreement(setting, starts.requests, decoded)
    return Continuation(median(times), 1e3 * median(walls), produced, agreement, starts.texts)


def _agreement(setting: Setting, starts: Sequence[Start], decoded: Sequence[Sequence[int]]) -> float:
    """Which share of what follows each text's pending token is the likeliest by a dense PyTorch pass."""
    target, agreed = setting.target.runner, 0
    with attached(target.model):
        for slot, (start, text) in enumerate(zip(starts, decoded, strict=True)):
            tokens = torch.tensor([text], device=target.device)
            step = target.step([slot], [start.length], len(text) - 1, DenseAttend(), metered=False)
            logits = target.forward(step, tokens[:, :-1], len(text) - 1)[..., : setting.pair.vocab_size]
            agreed += int((logits.argmax(-1) == tokens[:, 1:]).sum())
    return agreed / sum(len(text) - 1 for text in decoded)
