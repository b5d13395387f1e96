"""Top-p from scores to lists, beside a sort and FlashInfer's, and beside the time of reading the scores.

Rows are softmaxes of normal logits, with a sink and a rise towards the end: about a tenth of the positions hold .9 of
the mass. Each launch has scores that no cache knows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.benchmarks.timing import Launch, graph_us, sequence_us
from specattn.kernels.nucleus_lists import empty_lists, nucleus_lists
from specattn.selection.base import Selection

if TYPE_CHECKING:
    from specattn.benchmarks.report import Report

SHAPES = [(896, 32768), (256, 32768), (32, 131_072)]  # rows, length
RATED = SHAPES[:2]
QUICK = SHAPES[1:2]
"""The shapes that the ratios are of, and those of a quick run."""

DEVICE = "cuda"
P = 0.9
SINK, RECENT = 4, 64
PLACES = 4
"""A list has a place for one in so many positions of its row."""
SCALE = 2.5
"""Of the logits."""
ROTATED_BYTES = 400 << 20
"""Of all inputs of a timing: several times any L2 cache."""
BOUND = 1e-5
"""Of the mass, as :mod:`specattn.kernels.nucleus_lists` promises."""


def run(report: Report, bandwidth: float, quick: bool = False) -> None:
    """Check and time into ``report``.

    Ratios are those of the worst of the rated shapes: how many times faster than ``torch.sort`` and ``cumsum`` and, if
    it is installed, than FlashInfer's ``top_p_renorm_probs``; and how many times the time of reading the scores once.

    Args:
        bandwidth: bytes a second of a copy on this device.
        quick: one shape only.
    """
    times = {shape: _times(report, bandwidth, *shape) for shape in (QUICK if quick else SHAPES)}
    rated = [times[shape] for shape in RATED if shape in times]
    report.ratio("nucleus_vs_sort", min(us["sort"] / us["specattn"] for us in rated))
    if flashinfer_available():
        report.ratio("nucleus_vs_flashinfer", min(us["flashinfer"] / us["specattn"] for us in rated))
    report.ratio("nucleus_vs_read", max(us["specattn"] / us["read"] for us in rated))


def flashinfer_available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("flashinfer") is not None


def attention_rows(rows: int, length: int, seed: int) -> Tensor:
    """Scores ``[rows, length]`` like those of attention, none of them 0."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = SCALE * torch.randn(rows, length, generator=generator, device=DEVICE)
    logits[:, 0] += 8
    logits[:, -RECENT:] += 2
    return logits.softmax(-1)


def mass_error(lists: Selection, scores: Tensor) -> float:
    """How much mass is missing or not needed, the worst row's; NaN for lists that are not lists of the heaviest."""
    mask = lists.to_mask(scores.shape[-1])
    ascending = (lists.indices.diff() > 0) | (lists.indices[:, 1:] == -1)
    weights = scores.double() / scores.double().sum(-1, keepdim=True)
    kept = torch.where(mask, weights, 0).sum(-1)
    free = torch.ones_like(mask)
    free[:, :SINK] = free[:, -RECENT:] = False
    lightest = weights.masked_fill(~(mask & free), 2).amin(-1)
    heaviest_left = weights.masked_fill(mask, 0).amax(-1)
    well_formed = ascending.all() & torch.equal(mask.sum(-1), lists.counts.long())
    if not (well_formed and (mask | free).all() and (lightest >= heaviest_left).all()):
        return float("nan")
    return float(torch.maximum(P - kept, kept - lightest - P).amax().clamp(min=0))


def _times(report: Report, bandwidth: float, rows: int, length: int) -> dict[str, float]:
    """Microseconds by implementation; ``read`` is the time of reading the scores once."""
    copies = -(-ROTATED_BYTES // (4 * rows * length))
    inputs = [attention_rows(rows, length, seed) for seed in range(copies)]
    lengths = torch.full((rows,), length, dtype=torch.int32, device=DEVICE)
    outputs = [empty_lists(scores, length // PLACES) for scores in inputs]
    ours = [partial(_select, scores, lengths, out) for scores, out in zip(inputs, outputs, strict=True)]
    for launch in ours:
        launch()
    report.check(f"nucleus, {rows} x {length}", mass_error(outputs[0], inputs[0]), BOUND)
    us = {"read": 4 * rows * length / bandwidth * 1e6}
    us["specattn"] = graph_us(ours)
    us["sort"] = sequence_us([partial(_sort, scores) for scores in inputs])
    if flashinfer_available():
        us["flashinfer"] = sequence_us(_flashinfer(inputs))
    for implementation, time in us.items():
        report.row(rows=rows, length=length, implementation=implementation, us=time, reads=time / us["read"])
    if not flashinfer_available():
        report.row(rows=rows, length=length, implementation="flashinfer", note="not installed")
    return us


def _select(scores: Tensor, lengths: Tensor, out: Selection) -> None:
    nucleus_lists(scores, P, lengths, capacity=out.indices.shape[-1], sink=SINK, recent=RECENT, out=out)


def _sort(scores: Tensor) -> Tensor:
    return scores.sort(-1, descending=True).values.cumsum(-1)


def _flashinfer(inputs: list[Tensor]) -> list[Launch]:
    import flashinfer  # type: ignore[import-not-found,unused-ignore]

    renormalise: Callable[[Tensor, float], Tensor] = flashinfer.sampling.top_p_renorm_probs
    return [partial(renormalise, scores, P) for scores in inputs]
