"""``specattn bench decode``: rounds of named shapes with random weights, or of a pair that exists on texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specattn.benchmarks.decode_gate import check_rounds
from specattn.benchmarks.report import Report
from specattn.benchmarks.rounds import Plan, Rounds
from specattn.benchmarks.setting import FastPair, check_fast
from specattn.benchmarks.shapes import SHAPES, PairShape, Shape, random_mapping, random_model
from specattn.benchmarks.timing import Timer
from specattn.cache import check_memory
from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.documents import Document
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair

EXPORTED_HEADS = 64
"""Draft heads whose scores the random mixtures are of."""

REAL = "real"
"""What rows and ratios call a pair that exists."""


def run_shapes(
    names: Sequence[str], plan: Plan, timer: Timer, bandwidth: float, device: torch.device
) -> Report:
    """Check and time the named shapes, with random weights.

    Raises:
        CacheFullError: if nothing fits into memory.
    """
    report = Report()
    for name in names:
        check_rounds(report, name, SHAPES[name], plan.method, timer, device)
    for name in names if not report.failures else ():
        try:
            pair = random_pair(name, SHAPES[name], plan, device)
        except CacheFullError as error:
            report.row(shape=name, mode="skipped", note=str(error))
            continue
        Rounds(report, pair, plan, timer, bandwidth).measure()
        del pair
    return _checked(report)


def run_pair(
    pair: Pair, mapping: Mapping, texts: Sequence[Document], plan: Plan, timer: Timer, bandwidth: float
) -> Report:
    """Check and time a pair on the continuation of ``texts``, whose first tokens fill the caches.

    Raises:
        UsageError: if the pair cannot take the fast path.
        CacheFullError: if nothing fits into memory.
    """
    assert pair.draft is not None
    check_fast(pair.models, plan.method)
    report = Report()
    shape = PairShape(Shape.of(pair.target.config), Shape.of(pair.draft.config))
    check_rounds(report, REAL, shape, plan.method, timer, pair.device, pair.dtype)
    if not report.failures:
        length = _positions(plan, timer.repeats + 1)
        fast = FastPair.of(REAL, pair.target, pair.draft, mapping.to(pair.device), plan.method, length)
        Rounds(report, fast, plan, timer, bandwidth, texts).measure()
    return _checked(report)


def random_pair(name: str, shape: PairShape, plan: Plan, device: torch.device) -> FastPair:
    """Models of this shape with random weights.

    Raises:
        CacheFullError: if they do not fit on the device.
    """
    check_memory(shape.target.nbytes + shape.draft.nbytes, device, f"{name} with random weights")
    target, draft = (random_model(model, device) for model in (shape.target, shape.draft))
    mapping = random_mapping(shape, EXPORTED_HEADS, device)
    return FastPair.of(name, target, draft, mapping, plan.method, _positions(plan, 1))


def _positions(plan: Plan, rounds: int) -> int:
    """Positions that rotary tables must cover: whole pages."""
    return max(plan.contexts) + plan.room(rounds) + 16


def _checked(report: Report) -> Report:
    """``report``, if anything of it was timed or must not be."""
    if report.rows and all(row["mode"] == "skipped" for row in report.rows):
        raise CacheFullError(f"nothing fits into memory: {report.rows[-1]['note']}")
    return report


def read_vllm(path: Path | None) -> list[dict[str, Any]]:
    """The rows that ``benchmarks/vllm_decode.py`` wrote.

    Raises:
        UsageError: if the file holds none.
    """
    if path is None:
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in found if row["mode"] == "plain"]
        for row in rows:
            float(row["tokens_per_second"]), row["shape"], int(row["batch"]), int(row["context"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--vllm {path} holds no rows of vLLM ({error}); make it with benchmarks/vllm_decode.py"
        ) from None
    return rows


def check_vllm(rows: Sequence[dict[str, Any]], names: Sequence[str], plan: Plan) -> None:
    """Refuse rows of vLLM none of which is of what will be timed.

    Raises:
        UsageError: naming what they are of.
    """
    cells = {(name, *cell) for name in names for cell in plan.cells}
    theirs = [(row["shape"], row["batch"], row["context"]) for row in rows]
    if rows and cells.isdisjoint(theirs):
        name, batch, context = theirs[0]
        raise UsageError(
            "nothing that --vllm holds is to be timed; its first row is of "
            f"--shape {name} --batch {batch} --context {context}"
        )


def compare_with_vllm(report: Report, rows: Sequence[dict[str, Any]]) -> None:
    """Add ``dense_vs_vllm``: plain decoding's tokens a second over vLLM's, the worst of what both have timed."""
    theirs = {(row["shape"], row["batch"], row["context"]): row["tokens_per_second"] for row in rows}
    for row in report.rows:
        key = row["shape"], row.get("batch"), row.get("context")
        if row["mode"] == "plain" and key in theirs:
            ratio = row["tokens_per_second"] / theirs[key]
            report.ratio("dense_vs_vllm", min(ratio, report.ratios.get("dense_vs_vllm", ratio)))
