"""The correctness gate of decoding: rounds of a miniature pair against the modules and references that they replace.

The miniature has the groups and head sizes of the pair that is to be timed, and runs on the same device in the same
dtype. Both paths round, so logits are compared by their error ratio, and a chosen token by how much less likely the
other path finds it than its own choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specattn.attention import DenseAttend, ExportAttend, attached
from specattn.benchmarks.report import Report
from specattn.benchmarks.setting import FastPair, Setting, Steady
from specattn.benchmarks.shapes import PairShape, random_mapping, random_model
from specattn.benchmarks.timing import Timer
from specattn.kernels.check import error_ratio
from specattn.selection.dense import Dense
from specattn.selection.specattn import SpecAttn
from specattn.speculation import Speculator

LENGTHS = (700, 389, 64)
"""Tokens of the requests: more than a tile and less, no multiples of a page but one."""
GAMMA = 4
P = 0.7
HEADS = 16
LAYERS = 4, 3
"""Of the target and of the draft."""

BOUND = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of the error ratio of logits, and of what a token may fall short in standard deviations of the logits."""


@torch.inference_mode()
def check_rounds(
    report: Report,
    name: str,
    shape: PairShape,
    method: SpecAttn,
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Check dense and sparse rounds of a miniature of ``shape`` into ``report``.

    Args:
        method: of the sparse rounds, all but its ``p``: that is :data:`P`, so that something is left out. Nothing is
            drawn, since rounding decides what is. A sparse draft's are first rounds, whose lists are whole, since the
            other path's draft reads everything. The first layer is dense: a token at the edge of its lists, which
            rounding decides, would move all that follows.
    """
    torch.manual_seed(0)
    dense_layers = max(1, method.dense_layers)
    method = replace(method, p=P, dense_layers=dense_layers, tail=0, rate=0, power=1, eps=0)
    setting = _setting(shape, method, device, dtype)
    tokens = _read(setting)
    for mode in ("dense", "sparse"):
        found = _fast(setting, mode, tokens, timer)
        logits, drafted = _slow(setting, mode, tokens, found.proposed)
        bound = BOUND[dtype]
        what = f"{name}, {mode} round"
        report.check(f"{what}: the target's logits", error_ratio(found.logits, logits), bound)
        report.check(f"{what}: the draft's tokens", shortfall(drafted, found.proposed), bound)
        at = found.counts - 1
        next_token = found.tokens.gather(1, at[:, None])
        row = logits[torch.arange(len(at), device=device), at][:, None]
        report.check(f"{what}: the next token", shortfall(row, next_token), bound)
        report.check(f"{what}: CUDA graph", float((found.replayed != found.tokens).sum()), 0.0)


def shortfall(logits: Tensor, tokens: Tensor) -> float:
    """How far the worst of ``tokens`` is below the best of ``logits``, see :func:`shortfalls`."""
    return float(shortfalls(logits, tokens).amax())


def shortfalls(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far each of ``tokens`` ``[...]`` is below the best of ``logits`` ``[..., vocab]``, in deviations."""
    logits = logits.double()
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return (logits.amax(-1) - chosen) / logits.std(-1)


@dataclass(frozen=True)
class _Found:
    """What a fast round gave, operation by operation, and the tokens of its graph."""

    proposed: Tensor
    logits: Tensor
    tokens: Tensor
    counts: Tensor
    replayed: Tensor


def _setting(shape: PairShape, method: SpecAttn, device: torch.device, dtype: torch.dtype) -> Setting:
    small = PairShape(shape.target.miniature(LAYERS[0]), shape.draft.miniature(LAYERS[1]))
    small = replace(small, draft=replace(small.draft, hidden=128))
    target, draft = (random_model(model, device, dtype) for model in (small.target, small.draft))
    mapping = random_mapping(small, HEADS, device)
    length = max(LENGTHS) + GAMMA + 1
    pair = FastPair.of("miniature", target, draft, mapping, method, length + 16)
    return Setting(pair, len(LENGTHS), max(LENGTHS), GAMMA, GAMMA + 1)


def _read(setting: Setting) -> list[list[int]]:
    """Random texts of the :data:`LENGTHS` and one token more, in both caches but for the last."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(setting.pair.vocab_size, (length + 1,), generator=generator).tolist()
        for length in LENGTHS
    ]
    with attached(*setting.pair.models):
        for runner in setting.runners:
            for slot, text in enumerate(texts):
                runner.prefill(slot, text[:-1])
    return texts


def _fast(setting: Setting, mode: str, texts: list[list[int]], timer: Timer) -> _Found:
    round = setting.round(mode)
    setting.place(round, [(len(text) - 1, text[-2], text[-1]) for text in texts])
    steady = Steady(round)
    inputs = steady.inputs()
    proposal = round.propose(inputs)
    assert proposal is not None
    logits = round.target_logits(inputs, torch.cat([inputs.recent[:, 1:], proposal.tokens], 1)).clone()
    steady.reset()
    report = round.run()
    replay = timer.capture(round.run)
    steady.reset()
    replayed = replay()
    rows = GAMMA + 1
    return _Found(proposal.tokens, logits, report[:, :rows], report[:, rows], replayed[:, :rows])


def _slow(setting: Setting, mode: str, texts: list[list[int]], proposed: Tensor) -> tuple[Tensor, Tensor]:
    """The modules' logits: ``[batch, gamma + 1, vocab]`` of the target, ``[batch, gamma, vocab]`` of the draft."""
    target, draft = setting.runners
    method = setting.pair.method if mode == "sparse" else Dense()
    slow = Speculator(target, draft, method, setting.pair.mapping, setting.pair.vocab_size)
    slots, lengths = list(range(len(texts))), [len(text) - 1 for text in texts]
    recent = torch.tensor([text[-2:] for text in texts], device=target.device)
    export = slow.export(lengths, GAMMA)
    fed, starts, drafted = recent, [length - 1 for length in lengths], []
    with attached(*setting.pair.models):
        for row in range(GAMMA):
            attend = DenseAttend() if export is None else ExportAttend(export, row, 1)
            step = draft.step(slots, starts, fed.shape[1], attend)
            drafted.append(draft.forward(step, fed, 1))
            fed, starts = proposed[:, row : row + 1], [length + row + 1 for length in lengths]
        if export is not None and export.rows > GAMMA:
            draft.forward(draft.step(slots, starts, 1, ExportAttend(export, GAMMA, 1)), fed, 1)
        rows = torch.cat([recent[:, 1:], proposed], 1)
        verify = slow.sparse_attend(slots, lengths, GAMMA + 1, export)
        step = target.step(slots, lengths, GAMMA + 1, verify)
        logits = target.forward(step, rows, GAMMA + 1)
    return logits, torch.cat(drafted, 1)
