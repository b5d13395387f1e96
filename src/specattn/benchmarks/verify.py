"""Verification attention and dense decode over the paged pool, beside FlashInfer's decode on the same data.

One layer with the heads of Llama-3.1-8B. A timing is that of a CUDA graph with one launch for each of several batches,
whose requests share a pool of 4.3 GB of scattered pages, as a step over a model's layers would be: what a launch has
read has left the L2 cache before it is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specattn.benchmarks import flashinfer
from specattn.benchmarks.timing import graph_us
from specattn.cache import PagedKVCache
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.kernels.paged_attention import dense_paged_attention, sparse_paged_attention
from specattn.kernels.schedule import schedule
from specattn.kernels.sparse_attention import sparse_attention, trim
from specattn.kernels.tiling import Tiling, Workspace
from specattn.selection.base import Selection

if TYPE_CHECKING:
    from specattn.benchmarks.report import Report

HEADS = KVGeometry(layers=1, query_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
SCALING = HEADS.head_dim**-0.5
POOL_TOKENS = 1 << 20
DEVICE = "cuda"
BOUND = 1e-2  # of the error ratio

SHAPES = [(1, 32768), (8, 32768), (16, 32768), (1, 131072)]  # batch, context
DENSITIES = [0.05, 0.1, 0.2]
ROWS = [1, 5]

GOALS = {(16, 32768): "verify_b16_32k", (1, 131072): "verify_b1_128k"}
GOAL_DENSITY = 0.1
GOAL_ROWS = 5

UNEVEN = [0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.5, 3.0]
"""Lengths of the heads' lists over their mean, in the runs with uneven lists."""

SWEEP = [
    Tiling(tokens=64, warps=4, stages=4, programs=2),
    Tiling(tokens=64, warps=4, stages=3, programs=2),
    Tiling(tokens=64, warps=4, stages=6, programs=1),
    Tiling(tokens=32, warps=4, stages=4, programs=2),
    Tiling(tokens=32, warps=4, stages=4, programs=3),
    Tiling(tokens=32, warps=4, stages=6, programs=2),
    Tiling(tokens=32, warps=2, stages=4, programs=3),
    Tiling(tokens=64, warps=8, stages=4, programs=1),
    Tiling(tokens=64, warps=8, stages=6, programs=1),
    Tiling(tokens=128, warps=8, stages=3, programs=1),
    Tiling(tokens=128, warps=8, stages=4, programs=1),
    Tiling(tokens=64, warps=4, stages=3, programs=2, rows=64),
    Tiling(tokens=32, warps=4, stages=4, programs=2, rows=64),
    Tiling(tokens=32, warps=4, stages=6, programs=2, rows=64),
]
"""The first is what an H100 or H200 takes by default for up to 32 query rows a group."""

Launch = Callable[[], Tensor]


def run(report: Report, bandwidth: float, quick: bool = False, *, sweep: bool = False) -> None:
    """Check and time into ``report``.

    Ratios are the time of five rows at a tenth of the tokens over that tenth of FlashInfer's dense decode of one row,
    and that of dense decode over FlashInfer's; without FlashInfer there are none.

    Args:
        bandwidth: bytes a second of a copy on this device; rows say which fraction of it was reached.
        quick: only the shapes and the density of the ratios.
        sweep: time each of :data:`SWEEP` on those instead.
    """
    dense_ratios = []
    for batch, context in GOALS if quick or sweep else SHAPES:
        bench = Bench(report, bandwidth, batch, context)
        if sweep:
            bench.sweep()
            continue
        peer_us = bench.peer_dense()
        for rows in ROWS:
            us = bench.dense(rows)
            if peer_us and rows == 1:
                dense_ratios.append(us / peer_us)
        for density in [GOAL_DENSITY] if quick else DENSITIES:
            for rows in ROWS:
                us = bench.sparse(rows, density)
                if peer_us and (rows, density) == (GOAL_ROWS, GOAL_DENSITY) and (batch, context) in GOALS:
                    report.ratio(GOALS[batch, context], us / (density * peer_us))
            bench.peer_sparse(density)
        bench.sparse(GOAL_ROWS, GOAL_DENSITY, uneven=True)
    if dense_ratios:
        report.ratio("dense_vs_flashinfer", max(dense_ratios))


@dataclass(frozen=True)
class Work:
    """The input of one launch, as one layer gives it in one round."""

    slots: Tensor
    lengths: Tensor
    positions: Tensor
    query: Tensor  # [batch, rows, query_heads, head_dim]
    selection: Selection


class Bench:
    """A batch of requests of one length, in as many copies as the pool holds."""

    def __init__(self, report: Report, bandwidth: float, batch: int, context: int) -> None:
        self.report, self.bandwidth = report, bandwidth
        self.batch, self.context = batch, context
        self.cache = scattered_cache(context)
        self.copies = POOL_TOKENS // (batch * context)

    def works(self, rows: int, density: float, uneven: bool = False) -> list[Work]:
        """One launch's input for each copy: lists of random tokens and the round's own, with room for all."""
        return [self.work(copy, rows, density, uneven) for copy in range(self.copies)]

    def work(self, copy: int, rows: int, density: float, uneven: bool) -> Work:
        device, batch, context = self.cache.device, self.batch, self.context
        chance = density * torch.tensor(UNEVEN if uneven else [1.0] * HEADS.kv_heads, device=device)
        mask = torch.rand(batch, HEADS.kv_heads, context, device=device) < chance[:, None]
        mask[..., -rows:] = True
        return Work(
            slots=torch.arange(copy * batch, (copy + 1) * batch, device=device),
            lengths=torch.full((batch,), context, dtype=torch.int32, device=device),
            positions=torch.arange(context - rows, context, device=device).repeat(batch, 1),
            query=torch.randn(batch, rows, HEADS.query_heads, HEADS.head_dim, device=device).to(HEADS.dtype),
            selection=Selection.from_mask(mask),
        )

    # What is measured

    def dense(self, rows: int, tiling: Tiling | None = None) -> float:
        """Dense decode, microseconds."""
        works = self.works(rows, 1.0)
        launches = [self._dense_launch(work, tiling) for work in works]
        self._check(f"dense, {rows} rows", launches[0], works[0])
        return self._time("dense", "specattn", launches, works, rows=rows, tiling=str(tiling or "default"))

    def sparse(self, rows: int, density: float, uneven: bool = False, tiling: Tiling | None = None) -> float:
        """Attention over lists, microseconds."""
        works = self.works(rows, density, uneven)
        launches = [self._sparse_launch(work, tiling) for work in works]
        name = "sparse, uneven lists" if uneven else "sparse"
        self._check(f"{name}, {density:.0%} of the tokens, {rows} rows", launches[0], works[0])
        return self._time(
            name, "specattn", launches, works, rows=rows, density=density, tiling=str(tiling or "default")
        )

    def peer_dense(self) -> float | None:
        """FlashInfer's dense decode of one row, microseconds; ``None`` without FlashInfer."""
        if not flashinfer.available():
            return None
        works = self.works(1, 1.0)
        peer = flashinfer.FlashInferDecode(self.cache, HEADS.query_heads, SCALING)
        launches = [peer.dense(work.query[:, 0], work.slots, self.context) for work in works]
        self._check("FlashInfer, dense", launches[0], works[0])
        return self._time("dense", "flashinfer", launches, works, rows=1)

    def peer_sparse(self, density: float) -> None:
        """FlashInfer's decode of one row over the lists, as pages of one token."""
        if not flashinfer.available():
            return
        works = self.works(1, density)
        peer = flashinfer.FlashInferDecode(self.cache, HEADS.query_heads, SCALING)
        launches = [peer.sparse(work.query[:, 0], work.slots, trim(work.selection)) for work in works]
        self._check(f"FlashInfer, {density:.0%} of the tokens", launches[0], works[0])
        self._time("sparse", "flashinfer", launches, works, rows=1, density=density)

    def sweep(self) -> None:
        """Each tiling on what the ratios are about. One that needs more than the device has is reported as such."""
        from triton.runtime.errors import OutOfResources

        for tiling in SWEEP:
            try:
                self.sparse(GOAL_ROWS, GOAL_DENSITY, tiling=tiling)
                self.dense(1, tiling=tiling)
                self.dense(GOAL_ROWS, tiling=tiling)
            except OutOfResources as error:
                self.report.row(batch=self.batch, context=self.context, tiling=str(tiling), failed=str(error))

    # How

    def _sparse_launch(self, work: Work, tiling: Tiling | None) -> Launch:
        options = self._options(work, work.selection.counts, tiling, listed=True)
        return lambda: sparse_paged_attention(
            work.query,
            *self._layer(work),
            work.selection,
            work.positions,
            SCALING,
            self.cache.page_size,
            **options,
        )

    def _dense_launch(self, work: Work, tiling: Tiling | None) -> Launch:
        counts = work.lengths[:, None].expand(-1, HEADS.kv_heads)
        options = self._options(work, counts, tiling, listed=False)
        return lambda: dense_paged_attention(
            work.query,
            *self._layer(work),
            work.lengths,
            work.positions,
            SCALING,
            self.cache.page_size,
            **options,
        )

    def _layer(self, work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.cache.keys[0], self.cache.values[0], self.cache.block_table, work.slots

    def _options(self, work: Work, counts: Tensor, tiling: Tiling | None, *, listed: bool) -> dict[str, Any]:
        """With a schedule that is there before, as it is for all layers of a round but once."""
        batch, rows = work.query.shape[:2]
        workspace = Workspace.allocate(
            batch=batch,
            rows=rows,
            query_heads=HEADS.query_heads,
            kv_heads=HEADS.kv_heads,
            head_dim=HEADS.head_dim,
            dtype=HEADS.dtype,
            device=self.cache.device,
            tiling=tiling,
        )
        plan = schedule(counts[:, None], workspace, listed=listed).of_layer(0)
        return {"out": torch.empty_like(work.query), "workspace": workspace, "schedule": plan}

    def _check(self, what: str, launch: Launch, work: Work) -> None:
        """The last request of the batch against the reference in float32."""
        lists, rows = work.selection, work.positions[-1:]
        selection = trim(Selection(lists.indices[-1:], lists.counts[-1:]))
        keys, values = self.cache.gather(0, work.slots[-1:], selection.indices)
        expected = sparse_attention(work.query[-1:].float(), keys, values, selection, rows, SCALING)
        error = error_ratio(launch()[-1:].view_as(expected), expected)
        self.report.check(f"{self.batch} x {self.context}: {what}", error, BOUND)

    def _time(
        self, operation: str, implementation: str, launches: Sequence[Launch], works: list[Work], **about: Any
    ) -> float:
        us = graph_us(launches)
        tokens = sum(int(work.selection.counts.sum()) for work in works) / len(works)
        read = tokens * HEADS.row_bytes
        self.report.row(
            operation=operation,
            implementation=implementation,
            batch=self.batch,
            context=self.context,
            **about,
            us=us,
            bytes=read,
            copy_bandwidth_fraction=read / (us * 1e-6) / self.bandwidth,
        )
        return us


def scattered_cache(context: int) -> PagedKVCache:
    """A full cache of requests of ``context`` random tokens, whose pages lie anywhere."""
    slots = POOL_TOKENS // context
    cache = PagedKVCache(HEADS, tokens=POOL_TOKENS, slots=slots, max_length=context, device=DEVICE)
    for part in (cache.keys[0], cache.values[0]):
        part.normal_()
    pages = torch.randperm(cache.pages_for(POOL_TOKENS), device=DEVICE) + 1
    cache.block_table[:slots].copy_(pages.view(slots, -1))
    return cache
