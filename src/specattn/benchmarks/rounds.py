"""Rounds of decoding, timed whole: plain, dense speculation and sparse speculation on the same models and caches.

With random weights nothing is known of what a draft gets right, so the acceptance rate is imposed: a round that accepts
each proposal with probability ``a`` yields ``(1 - a^(gamma+1)) / (1 - a)`` tokens. All else, from the draft's steps to
acceptance, is what decoding does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specattn.benchmarks.continuation import Continuation, continue_texts, read_texts
from specattn.benchmarks.cycles import Cycles, continue_losslessly
from specattn.benchmarks.cycles import room as cycles_room
from specattn.benchmarks.imposed import check_density
from specattn.benchmarks.report import Report
from specattn.benchmarks.setting import MODES, FastPair, Setting, Steady
from specattn.benchmarks.timing import Timer
from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.documents import Document
from specattn.fast.round import FastRound
from specattn.fast.sparse_draft import SINK, newest
from specattn.gamma import check_gamma
from specattn.plan import draft_steps
from specattn.selection.base import Method
from specattn.selection.specattn import SpecAttn

RATED = (32768, 16)
"""Context and batch at which the share of the selection is rated."""


AMISS = 1e-2
"""Share of lossless tokens that may fall short: over many layers in a short dtype a few differ by more than usual."""


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        gamma: draft tokens a round.
        density: share of the context that sparse layers read, and
        acceptance: share of the proposals that stand: both imposed where weights are random.
        method: how sparse rounds select.
        resident: requests with pages of their own, see :class:`specattn.benchmarks.setting.Setting`; all if ``None``.
        lossless: after how many tokens cycles of the lossless mode verify, or ``auto``; none are timed if ``None``.
        lossless_method: what runs ahead in them; ``method`` if ``None``.
    """

    contexts: Sequence[int]
    batches: Sequence[int]
    method: SpecAttn
    gamma: int = 4
    density: float = 0.1
    acceptance: float = 0.7
    resident: int | None = None
    lossless: int | str | None = None
    lossless_method: Method | None = None

    def check(self) -> None:
        """Refuse what cannot be timed.

        Raises:
            UsageError: naming the value.
        """
        check_gamma(self.gamma)
        check_density(self.density, self.method.p)
        if self.method.draft_p < 1:
            check_density(self.density, self.method.draft_p)
        if not 0 <= self.acceptance <= 1:
            raise UsageError(f"acceptance {self.acceptance:g} must lie between 0 and 1")
        least = self.method.sink + self.method.window + self.gamma + 2
        if self.method.draft_p < 1:
            least = max(least, SINK + newest(draft_steps(self.method, self.gamma)))
        for context in self.contexts:
            if context < least:
                raise UsageError(
                    f"context {context} is below {least}, which the method always reads; give more"
                )

    def room(self, rounds: int) -> int:
        """Tokens that ``rounds`` rounds, or the cycles of the lossless mode, may add to each request."""
        cycles = 0 if self.lossless is None else cycles_room(self.lossless, self.gamma)
        return max(rounds * (self.gamma + 1), cycles)

    @property
    def cells(self) -> Iterator[tuple[int, int]]:
        """Every batch and context."""
        return ((batch, context) for batch in self.batches for context in self.contexts)


def expected_tokens(gamma: int, acceptance: float) -> float:
    """Tokens that a round yields on average: ``1 + a + ... + a^gamma``."""
    return sum(acceptance**accepted for accepted in range(gamma + 1))


@dataclass(frozen=True)
class Rounds:
    """Times the rounds of ``pair`` into ``report``.

    Attributes:
        bandwidth: bytes a second of a copy on this device; rows say which fraction of it was reached.
        texts: what fills the caches and is continued; without, keys and values are random and acceptance and density
            are imposed.
    """

    report: Report
    pair: FastPair
    plan: Plan
    timer: Timer
    bandwidth: float
    texts: Sequence[Document] = ()

    @torch.inference_mode()
    def measure(self) -> None:
        """Time every cell of the plan; what does not fit into memory becomes a row that says so."""
        for batch, context in self.plan.cells:
            reason = None
            try:
                self._measure_cell(batch, context)
            except (CacheFullError, torch.OutOfMemoryError) as error:
                reason = str(error).splitlines()[0]
            # Outside of the handler: the exception holds on to what was made.
            if reason is not None:
                row = {"shape": self.pair.name, "batch": batch, "context": context}
                self.report.row(**row, mode="skipped", note=reason)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure_cell(self, batch: int, context: int) -> None:
        plan = self.plan
        room = plan.room(self.timer.repeats + 1 if self.texts else 1)
        resident = None if self.texts else plan.resident
        setting = Setting(self.pair, batch, context, plan.gamma, room, resident)
        starts = read_texts(setting, self.texts) if self.texts else None
        if starts is None:
            setting.fill()
        rows = {}
        for mode in MODES:
            round = setting.round(mode, plan.density if starts is None else None)
            found = None if starts is None else continue_texts(setting, round, starts, self.timer)
            rows[mode] = self._row(setting, round, mode, found)
            del round
        if starts is not None and plan.lossless is not None:
            method = plan.lossless_method or plan.method
            cycles = continue_losslessly(setting, starts, method, plan.lossless)
            what = f"{self.pair.name}, lossless cycles, batch {batch}, context {context}: what is delivered"
            self.report.check(what, cycles.amiss, AMISS)
            rows["lossless"] = self._lossless_row(setting, method, cycles, starts.texts)
        _add_shares(rows, self.bandwidth)
        for row in rows.values():
            self.report.row(**row)
        _add_ratios(self.report, self.pair.name, rows, batch, context)

    def _row(
        self, setting: Setting, round: FastRound, mode: str, found: Continuation | None
    ) -> dict[str, Any]:
        """What one round takes, reads and yields; ``found`` is what the continuation of texts was like."""
        before = setting.reads()
        steady = Steady(round)
        round.run()
        read, full, draft_read = (after - b for after, b in zip(setting.reads(), before, strict=True))
        gamma = round.gamma
        tokens = found.tokens_a_round if found else expected_tokens(gamma, self.plan.acceptance)
        ms = found.ms if found else self.timer.median_ms(round.run, steady.reset)
        row: dict[str, Any] = {
            "shape": self.pair.name,
            "weights": "trained" if found else "random",
            "batch": setting.batch,
            "context": setting.context,
            "mode": mode,
            "gamma": gamma,
            "acceptance": _acceptance(gamma, self.plan, found),
            "density": _density(setting, read / full) if mode == "sparse" else 1.0,
            "kv_read_fraction": read / full,
            "tokens_a_round": tokens,
            "ms": ms,
            "tokens_per_second": setting.batch * tokens / ms * 1e3,
            **self._parts(steady),
            "bytes": self.pair.weight_bytes(gamma, round.method) + read + draft_read,
        }
        if found:
            row |= {"wall_ms": found.wall_ms, "texts": found.texts, "top1_agreement": found.agreement}
        elif setting.resident < setting.batch:
            row["resident"] = setting.resident
        return row

    def _lossless_row(self, setting: Setting, method: Method, found: Cycles, texts: int) -> dict[str, Any]:
        """The same of a cycle of the lossless mode, which is what counts as a round here."""
        gamma = 0 if found.acceptance is None else setting.gamma
        weights = self.pair.weight_bytes
        passes = weights(0, method) + found.largest_rounds * weights(gamma, method)
        return {
            "shape": self.pair.name,
            "weights": "trained",
            "batch": setting.batch,
            "context": setting.context,
            "mode": "lossless",
            "method": method.spec(),
            "gamma": gamma,
            "acceptance": found.acceptance,
            "kv_read_fraction": found.read / found.full,
            "tokens_a_round": found.tokens,
            "tokens_ahead": found.ahead,
            "sparse_rounds": found.rounds,
            "dense_reads_per_token": 1 / found.tokens,
            "ms": found.ms,
            "tokens_per_second": setting.batch * found.tokens / found.ms * 1e3,
            "verification_ms": found.dense_ms,
            "bytes": passes + found.read + found.draft_read,
            "wall_ms": found.wall_ms,
            "texts": texts,
        }

    def _parts(self, steady: Steady) -> dict[str, float]:
        """Milliseconds of what a round begins with, by itself."""
        parts = {}
        if steady.round.gamma:
            parts["draft_ms"] = self.timer.median_ms(steady.propose, steady.reset)
        if steady.round.selector is not None:
            parts["selection_ms"] = self.timer.median_ms(steady.select, steady.reset)
        if steady.drafts_sparsely:
            steady.propose()
            scoring = self.timer.median_ms(steady.score, steady.reset)
            parts["scoring_ms"] = scoring + self.timer.median_ms(steady.list, steady.reset)
        return parts


def _acceptance(gamma: int, plan: Plan, found: Continuation | None) -> float | None:
    """Accepted over proposed tokens, or the rate that is imposed."""
    if not gamma:
        return None
    return (found.tokens_a_round - 1) / gamma if found else plan.acceptance


def _density(setting: Setting, fraction: float) -> float:
    """The share that the sparse layers read, where all layers together read ``fraction``."""
    layers = setting.target.runner.geometry.layers
    dense = sum(map(setting.pair.method.is_dense, range(layers)))
    return (fraction * layers - dense) / (layers - dense)


def _add_shares(rows: dict[str, dict[str, Any]], bandwidth: float) -> None:
    """Each row's bandwidth; what the selection takes of a sparse round, exporting the scores included."""
    for row in rows.values():
        row["copy_bandwidth_fraction"] = row["bytes"] / (row["ms"] * 1e-3) / bandwidth
    sparse, dense = rows["sparse"], rows["dense"]
    exporting = sparse.get("scoring_ms", max(sparse["draft_ms"] - dense["draft_ms"], 0.0))
    sparse["selection_share"] = (exporting + sparse["selection_ms"]) / sparse["ms"]
    for row in (dense, sparse):
        row["verification_ms"] = row["ms"] - row["draft_ms"] - row.get("selection_ms", 0.0)


def _add_ratios(report: Report, name: str, rows: dict[str, dict[str, Any]], batch: int, context: int) -> None:
    speeds = {mode: row["tokens_per_second"] for mode, row in rows.items()}
    key = f"{name}_{context_label(context)}_b{batch}"
    report.ratio(f"{key}_vs_speculation", speeds["sparse"] / speeds["dense"])
    report.ratio(f"{key}_vs_plain", speeds["sparse"] / speeds["plain"])
    if "lossless" in speeds:
        report.ratio(f"{key}_lossless_vs_speculation", speeds["lossless"] / speeds["dense"])
        report.ratio(f"{key}_lossless_vs_plain", speeds["lossless"] / speeds["plain"])
    if (context, batch) == RATED:
        worst = report.ratios.get("selection_overhead", 0.0)
        report.ratio("selection_overhead", max(worst, rows["sparse"]["selection_share"]))


def context_label(context: int) -> str:
    """``32k`` for 32,768 tokens; a number that is no multiple of 1,024 as it is."""
    return str(context) if context % 1024 else f"{context // 1024}k"
