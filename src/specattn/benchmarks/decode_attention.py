"""The draft's attention, dense and in two sparse phases, what exporting its scores costs, and their mixture.

One layer of a draft, bfloat16, over scattered pages of 16. A timing is that of a CUDA graph of launches over different
requests, as a step over a model's layers is: what a launch has read has left the L2 cache before it is read again. The
scores of all heads, which one layer writes and reads and the next overwrites, are one buffer, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.benchmarks.timing import graph_us
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.kernels.export_attention import export_attention, export_attention_reference
from specattn.kernels.head_mixture import head_mixture, head_mixture_reference
from specattn.kernels.paged import PagedBatch
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys
from specattn.kernels.quantised_scores import quantised_scores, quantised_scores_reference
from specattn.kernels.score_export import ScoreExport, export_places
from specattn.kernels.split_kv import SplitWorkspace
from specattn.kernels.value_attention import value_attention, value_attention_reference

if TYPE_CHECKING:
    from specattn.benchmarks.report import Report

Launch = Callable[[], object]

CONTEXT = 32768
BATCHES = [16, 1]
ROWS = 4  # draft steps a round
EXPORT_HEADS = 64
LISTED = 0.15
"""Share of the tokens whose values the sparse draft reads: about its own nucleus at p = .95."""
POOL_TOKENS = 1 << 21
PAGE = 16
BOUND = 1e-2  # of the error ratio
DEVICE = "cuda"


@dataclass(frozen=True)
class Draft:
    """A draft's shapes, and how many heads of its target the mixture predicts."""

    name: str
    geometry: KVGeometry
    targets: int

    @property
    def exported(self) -> int:
        """Heads that a layer exports, on average, rounded up."""
        return -(-EXPORT_HEADS // self.geometry.layers)


DRAFTS = [
    Draft("Qwen2.5-0.5B", KVGeometry(24, 14, 2, 64, torch.bfloat16), targets=28 * 2),
    Draft("Llama-3.2-1B", KVGeometry(16, 32, 8, 64, torch.bfloat16), targets=32 * 8),
]


def run(report: Report, bandwidth: float, quick: bool = False) -> None:
    """Check and time into ``report``.

    Ratios, for each draft and batch: ``export``, the time of dense attention with export over that without, and
    ``sparse``, the time of both sparse phases with what lies between over that of dense attention with export (the
    draft's nucleus is timed elsewhere). The row ``selection`` is what a round spends on exporting and mixing.

    Args:
        bandwidth: bytes a second of a copy on this device; rows say which fraction of it was reached.
        quick: only the first draft.
    """
    for draft in DRAFTS[:1] if quick else DRAFTS:
        layer = Layer(draft.geometry)
        for batch in BATCHES:
            bench = Bench(report, bandwidth, draft, layer, batch)
            dense, export = bench.dense(exported=False), bench.dense(exported=True)
            sparse = bench.scores() + bench.group_mean() + bench.values()
            mixture = bench.mixture()
            exporting = ROWS * draft.geometry.layers * (export - dense)
            report.row(draft=draft.name, batch=batch, operation="selection", us=exporting + mixture)
            report.ratio(f"export_{draft.name}_b{batch}", export / dense)
            report.ratio(f"sparse_{draft.name}_b{batch}", sparse / export)


class Layer:
    """One layer's pool, full of random tokens, its quantised keys, and requests whose pages lie anywhere."""

    def __init__(self, geometry: KVGeometry) -> None:
        shape = (POOL_TOKENS + PAGE, geometry.kv_heads, geometry.head_dim)
        self.keys, self.values = (torch.randn(shape, device=DEVICE).to(geometry.dtype) for _ in "kv")
        self.copy = QuantisedKeys.empty(self.keys, bits=4)
        quantise_keys(self.keys, torch.arange(shape[0], device=DEVICE), self.copy)
        pages = torch.randperm(POOL_TOKENS // PAGE, device=DEVICE, dtype=torch.int32) + 1
        self.table = pages.view(POOL_TOKENS // CONTEXT, CONTEXT // PAGE)


class Bench:
    """A batch of requests of one length, in as many copies as the pool holds."""

    def __init__(self, report: Report, bandwidth: float, draft: Draft, layer: Layer, batch: int) -> None:
        self.report, self.bandwidth, self.draft, self.layer = report, bandwidth, draft, layer
        geometry = draft.geometry
        self.batch, self.scaling = batch, geometry.head_dim**-0.5
        slots = torch.arange(POOL_TOKENS // CONTEXT, device=DEVICE)
        lengths = torch.full((batch,), CONTEXT, dtype=torch.int32, device=DEVICE)
        self.batches = [PagedBatch(layer.table, own, lengths, PAGE) for own in slots.split(batch)]
        shape = (batch, 1, geometry.query_heads)
        self.query = torch.randn(*shape, geometry.head_dim, device=DEVICE).to(geometry.dtype)
        self.out = torch.empty_like(self.query)
        self.logits = torch.empty(*shape, CONTEXT, dtype=torch.float16, device=DEVICE)
        self.lse = torch.empty(shape, device=DEVICE)
        # A round's exports, for the mixture, and the part of one step and layer.
        self.round_logits = torch.randn(batch, ROWS, EXPORT_HEADS, CONTEXT, device=DEVICE).half()
        self.round_lse = self.round_logits.float().logsumexp(-1)
        heads = torch.arange(draft.exported, device=DEVICE) * (geometry.query_heads // draft.exported)
        places = export_places(heads, 1, geometry.query_heads)[0]
        self.export = ScoreExport(places, self.round_logits[:, 0], self.round_lse[:, 0])
        self.workspace = SplitWorkspace.allocate(
            batch=batch,
            rows=1,
            query_heads=geometry.query_heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            length=CONTEXT,
            device=DEVICE,
        )

    # What is measured, each in microseconds a launch

    def dense(self, exported: bool) -> float:
        """Dense attention of one row, with or without exported scores."""
        export = self.export if exported else None
        pool = self.layer.keys, self.layer.values
        attend = partial(export_attention, out=self.out, workspace=self.workspace, export=export)
        launches = [partial(attend, self.query, *pool, batch, self.scaling) for batch in self.batches]
        launches[0]()
        expected = torch.empty_like(self.query[-1:], dtype=torch.float32)
        reference = self._last_export() if exported else None
        last = self.query[-1:], *pool, self._last(self.batches[0]), self.scaling
        export_attention_reference(*last, out=expected, export=reference)
        name = "dense with export" if exported else "dense"
        self._check(name, self.out[-1:], expected)
        if reference is not None:
            self._check_export(name, reference)
        return self._time(name, launches, self._kv_bytes() + exported * self._export_bytes())

    def scores(self) -> float:
        """The first sparse phase, with exported scores."""
        buffers = partial(quantised_scores, logits=self.logits, lse=self.lse)
        score = partial(buffers, workspace=self.workspace, export=self.export)
        launches = [
            partial(score, self.query, self.layer.copy, batch, self.scaling) for batch in self.batches
        ]
        launches[0]()
        logits, lse = torch.empty_like(self.logits[-1:]), torch.empty_like(self.lse[-1:])
        reference = self._last_export()
        last = self.query[-1:], self.layer.copy, self._last(self.batches[0]), self.scaling
        quantised_scores_reference(*last, logits=logits, lse=lse, export=reference)
        found = (self.logits[-1:].float() - self.lse[-1:, ..., None]).exp()
        self._check("scores from 4 bits", found, (logits.float() - lse[..., None]).exp())
        self._check_export("scores from 4 bits", reference)
        key_bytes = self.layer.copy.nbytes / len(self.layer.keys) * self.batch * CONTEXT
        written = self.logits.nbytes + self._export_bytes()
        return self._time("scores from 4 bits", launches, key_bytes + written)

    def group_mean(self) -> float:
        """Each group's mean attention, from which the draft's nucleus is taken."""
        kv_heads, group = self.draft.geometry.kv_heads, self.draft.geometry.group
        weights = torch.eye(kv_heads, device=DEVICE).repeat_interleave(group, 1) / group
        return self._mix("mean of groups", self.logits, self.lse, weights)

    def values(self) -> float:
        """The second sparse phase, over random lists."""
        heads = self.draft.geometry.kv_heads
        lists = [self._lists(heads) for _ in self.batches]
        counts = torch.full((self.batch, heads), lists[0].shape[-1], dtype=torch.int32, device=DEVICE)
        attend = partial(value_attention, out=self.out, workspace=self.workspace)
        launches = [
            partial(attend, self.logits, self.layer.values, indices, counts, batch)
            for indices, batch in zip(lists, self.batches, strict=True)
        ]
        launches[0]()
        expected = torch.empty_like(self.out[-1:], dtype=torch.float32)
        last = lists[0][-1:], counts[-1:], self._last(self.batches[0])
        value_attention_reference(self.logits[-1:], self.layer.values, *last, out=expected)
        self._check("values of lists", self.out[-1:], expected)
        weights = self.draft.geometry.group * self.logits.itemsize
        each = self.draft.geometry.row_bytes / 2 + lists[0].itemsize + weights
        return self._time("values of lists", launches, lists[0].numel() * each)

    def mixture(self) -> float:
        """A round's mixture for all heads of the target; once a round."""
        weights = torch.randn(self.draft.targets, EXPORT_HEADS, device=DEVICE).softmax(-1)
        self.round_logits.normal_()
        self.round_lse.copy_(self.round_logits.float().logsumexp(-1))
        return self._mix("mixture", self.round_logits, self.round_lse, weights)

    # How

    def _mix(self, name: str, logits: Tensor, lse: Tensor, weights: Tensor) -> float:
        lengths = self.batches[0].lengths
        out = torch.empty(self.batch, len(weights), CONTEXT, device=DEVICE)
        launch = partial(head_mixture, logits, lse, weights, lengths, out=out)
        launch()
        expected = torch.empty_like(out[-1:])
        head_mixture_reference(logits[-1:], lse[-1:], weights, lengths[-1:], out=expected)
        self._check(name, out[-1:], expected)
        return self._time(name, [launch], logits.nbytes + out.nbytes)

    def _lists(self, heads: int) -> Tensor:
        chosen = torch.rand(self.batch, heads, CONTEXT, device=DEVICE).topk(int(LISTED * CONTEXT)).indices
        return chosen.sort(-1).values.int()

    def _last(self, batch: PagedBatch) -> PagedBatch:
        """The last request alone: what references are asked for."""
        return PagedBatch(batch.block_table, batch.slots[-1:], batch.lengths[-1:], batch.page_size)

    def _last_export(self) -> ScoreExport:
        logits, lse = self.export.logits[-1:], self.export.lse[-1:]
        return ScoreExport(self.export.places, torch.zeros_like(logits), torch.zeros_like(lse))

    def _check_export(self, name: str, reference: ScoreExport) -> None:
        exported = slice(0, self.draft.exported)
        found, expected = (
            (logits[-1, exported].float() - lse[-1, exported, None]).exp()
            for logits, lse in ((self.export.logits, self.export.lse), (reference.logits, reference.lse))
        )
        self._check(f"{name}, probabilities", found, expected)

    def _check(self, name: str, found: Tensor, expected: Tensor) -> None:
        what = f"{self.draft.name}, {self.batch} x {CONTEXT}: {name}"
        self.report.check(what, error_ratio(found, expected), BOUND)

    def _kv_bytes(self) -> float:
        return self.batch * CONTEXT * self.draft.geometry.kv_heads * self.draft.geometry.row_bytes

    def _export_bytes(self) -> float:
        return self.batch * CONTEXT * self.draft.exported * self.export.logits.itemsize

    def _time(self, operation: str, launches: Sequence[Launch], moved: float) -> float:
        us = graph_us(launches)
        self.report.row(
            draft=self.draft.name,
            batch=self.batch,
            context=CONTEXT,
            operation=operation,
            us=us,
            bytes=moved,
            copy_bandwidth_fraction=moved / (us * 1e-6) / self.bandwidth,
        )
        return us
