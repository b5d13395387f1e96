"""Block-sparse causal attention of a prompt beside PyTorch's fused dense attention.

One layer with the heads of Llama-3.1-8B, one request, bfloat16, tensors as a model's projections leave them. Lists are
random but for the blocks on the diagonal, so a density is met exactly as asked, on average; what choosing blocks costs
is in the row ``both stages``, on tokens whose blocks are alike, where the method itself chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from specattn.benchmarks.timing import median_ms
from specattn.geometry import KVGeometry
from specattn.kernels.block_sparse_attention import block_sparse_attention as reference
from specattn.kernels.block_sparse_launch import BlockTiling, block_sparse_attention
from specattn.kernels.blocks import BlockGrid, BlockLists
from specattn.kernels.check import error_ratio
from specattn.kernels.int8_blocks import quantise_blocks, smooth_keys
from specattn.prefill.thresholds import LAM, Thresholds
from specattn.prefill.two_stage import KEY_BLOCK, QUERY_BLOCK, two_stage_attention

if TYPE_CHECKING:
    from specattn.benchmarks.report import Report

HEADS = KVGeometry(layers=1, query_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
SCALING = HEADS.head_dim**-0.5
DEVICE = "cuda"
LENGTHS = [8192, 32768]
DENSITIES = [1.0, 0.5, 0.25, 0.1]
BOUND = 1e-2  # of the error ratio

PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Fused attention of PyTorch; ratios are to the fastest that runs here."""

FADED, FADED_LAM = 0.05, 1.0
"""Factor of every second key block, and the lam at which such blocks are skipped: half of the values."""

SWEEP = [
    BlockTiling(warps=8, stages=3),
    BlockTiling(warps=8, stages=2),
    BlockTiling(warps=8, stages=4),
    BlockTiling(warps=8, stages=3, registers=128),
    BlockTiling(warps=8, stages=2, registers=128),
    BlockTiling(warps=4, stages=3),
    BlockTiling(warps=4, stages=2),
]
"""The first is what 128 channels get by default."""

Launch = Callable[[], Tensor]
Operands = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]
"""Queries, keys and values, and the scales of the first two if they are integers."""


def run(report: Report, bandwidth: float, quick: bool = False, *, sweep: bool = False) -> None:
    """Check and time into ``report``.

    Ratios are how many times faster than the fastest peer: ``prefill_LENGTH_DENSITY`` with integers, and
    ``prefill_LENGTH_both`` of the whole method, choosing and rounding included.

    Args:
        bandwidth: of no interest here, where products and not bytes count.
        quick: the shortest length only.
        sweep: time each of :data:`SWEEP` with integers at full density instead.
    """
    for length in LENGTHS[:1] if quick else LENGTHS:
        bench = Bench(report, length)
        if sweep:
            bench.sweep()
            continue
        peer_us = bench.peers()
        for density in DENSITIES:
            us = bench.sparse(density)
            bench.sparse(density, int8=False)
            report.ratio(f"prefill_{length}_{density:g}", peer_us / us)
        bench.skipping()
        bench.rounding()
        report.ratio(f"prefill_{length}_both", peer_us / bench.both_stages())


@dataclass(frozen=True)
class Prompt:
    """Queries, keys and values ``[1, heads, length, head_dim]``, views of token-major memory."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, length: int) -> Prompt:
        """Normal queries, keys and values."""
        return cls(*(_tokens(heads, length) for heads in (HEADS.query_heads, HEADS.kv_heads, HEADS.kv_heads)))

    @classmethod
    def alike(cls, length: int) -> Prompt:
        """The same, where the queries and keys of a block of 128 tokens resemble each other."""
        plain = cls.random(length)
        parts = [_tokens(part.shape[1], -(-length // QUERY_BLOCK)) for part in (plain.query, plain.key)]
        shared = [part.repeat_interleave(QUERY_BLOCK, 2)[:, :, :length] for part in parts]
        return cls(1.5 * shared[0] + 0.5 * plain.query, 1.5 * shared[1] + 0.5 * plain.key, plain.value)

    def faded(self) -> Prompt:
        """The same, every second block of whose keys is far behind the others."""
        odd = torch.arange(self.key.shape[2], device=DEVICE) // KEY_BLOCK % 2 == 1
        return Prompt(self.query, torch.where(odd[:, None], FADED * self.key, self.key), self.value)

    def operands(self) -> Operands:
        """What is multiplied as it is."""
        return self.query, self.key, self.value, None

    def integers(self) -> Operands:
        """What is multiplied where queries and keys are integers."""
        query, query_scales = quantise_blocks(self.query, QUERY_BLOCK)
        key, key_scales = quantise_blocks(smooth_keys(self.key), KEY_BLOCK)
        return query, key, self.value, (query_scales, key_scales)


class Bench:
    """Prompts of one length."""

    def __init__(self, report: Report, length: int) -> None:
        self.report, self.length = report, length
        self.grid = BlockGrid(length, length, 0, QUERY_BLOCK, KEY_BLOCK)
        self.prompt = Prompt.random(length)

    # What is measured, in microseconds

    def peers(self) -> float:
        """Dense attention by PyTorch, the fastest that runs; one that refuses is reported as such."""
        times = []
        for name, backend in PEERS.items():
            launch = partial(self._dense, backend)
            try:
                out = launch()
            except RuntimeError as error:
                self.report.row(length=self.length, implementation=name, note=str(error).splitlines()[0])
                continue
            self._check(f"{name}, dense", out, self.prompt.operands(), self.lists(1.0))
            times.append(self._time(name, launch, 1.0))
        return min(times, default=float("nan"))

    def sparse(
        self,
        density: float,
        *,
        int8: bool = True,
        lam: float = LAM,
        prompt: Prompt | None = None,
        tiling: BlockTiling | None = None,
    ) -> float:
        """The kernel over lists, what it multiplies made before."""
        prompt, lists = prompt or self.prompt, self.lists(density)
        operands = prompt.integers() if int8 else prompt.operands()
        query, key, value, scales = operands
        attend = partial(block_sparse_attention, query, key, value, lists, start=0, scaling=SCALING)
        lams = torch.full((HEADS.query_heads,), lam, device=DEVICE)
        attend = partial(attend, scales=scales, lam=lams, tiling=tiling)
        out, skipped = attend()
        name = f"{'int8' if int8 else 'bfloat16'}, {density:.0%}, lam {lam:g}, {tiling or 'default'}"
        self._check(name, out, operands, lists, lam=lams[:1])
        about = {"dtype": "int8" if int8 else "bfloat16", "tiling": str(tiling or "default")}
        about["skipped"] = f"{float(skipped.sum() / self._products(lists)):.2f}"
        return self._time("specattn", lambda: attend()[0], density, lists, **about)

    def skipping(self) -> None:
        """Full density, where half of the values need not be multiplied."""
        self.sparse(1.0, prompt=self.prompt.faded(), lam=FADED_LAM)

    def rounding(self) -> None:
        """Making integers of queries and keys, once for a call."""
        us = median_ms(self.prompt.integers) * 1e3
        self.report.row(length=self.length, implementation="specattn", operation="rounding", us=us)

    def both_stages(self) -> float:
        """The whole method with its defaults, on tokens that are alike."""
        prompt = Prompt.alike(self.length)
        thresholds = Thresholds.uniform(0.6, 0.98, LAM, HEADS.query_heads, DEVICE)
        attend = partial(two_stage_attention, prompt.query, prompt.key, prompt.value, thresholds)
        attend = partial(attend, start=0, scaling=SCALING, int8=True)
        us = median_ms(attend) * 1e3
        density = float(attend().computed.mean())
        row = {"length": self.length, "implementation": "specattn", "operation": "both stages"}
        self.report.row(**row, density=density, us=us)
        return us

    def sweep(self) -> None:
        """Each tiling. One that needs more than the device has is reported as such."""
        from triton.runtime.errors import OutOfResources

        for tiling in SWEEP:
            try:
                self.sparse(1.0, tiling=tiling)
                self.sparse(1.0, tiling=tiling, int8=False)
            except OutOfResources as error:
                self.report.row(length=self.length, tiling=str(tiling), failed=str(error))

    # How

    def lists(self, density: float) -> BlockLists:
        """Random blocks of each row of blocks, and those on the diagonal."""
        generator = torch.Generator(DEVICE).manual_seed(self.length)
        device = torch.device(DEVICE)
        shape = (1, HEADS.query_heads, self.grid.query_blocks, self.grid.key_blocks)
        chosen = torch.rand(shape, generator=generator, device=device) < density
        visible = torch.arange(shape[-1], device=device) < self.grid.visible(device)[:, None]
        mask = (chosen | self.grid.diagonal(device)) & visible
        return BlockLists.from_mask(mask, QUERY_BLOCK, KEY_BLOCK)

    def _dense(self, backend: SDPBackend) -> Tensor:
        prompt = self.prompt
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                prompt.query, prompt.key, prompt.value, is_causal=True, scale=SCALING, enable_gqa=True
            )

    def _check(self, name: str, out: Tensor, operands: Operands, lists: BlockLists, **options: Any) -> None:
        """The last head's last block of rows against the reference, which multiplies the same in float32."""
        first = (self.grid.query_blocks - 1) * QUERY_BLOCK
        last = BlockLists(lists.indices[:, -1:, -1:], lists.counts[:, -1:, -1:], QUERY_BLOCK, KEY_BLOCK)
        query, key, value, scales = operands
        if scales is not None:
            scales = scales[0][:, -1:, -1:], scales[1][:, -1:]
        rows = (query[:, -1:, first:], key[:, -1:], value[:, -1:])
        expected, _ = reference(*rows, last, start=first, scaling=SCALING, scales=scales, **options)
        self.report.check(f"{self.length}: {name}", error_ratio(out[:, -1:, first:], expected), BOUND)

    def _products(self, lists: BlockLists) -> float:
        """Query-key products of all heads over the lists."""
        mask = torch.zeros(*lists.counts.shape, self.grid.key_blocks, device=DEVICE, dtype=torch.float64)
        used = lists.indices >= 0
        mask.scatter_add_(-1, lists.indices.clamp(min=0).long(), used.double())
        return float((mask * self.grid.products(mask.device)).sum())

    def _time(
        self,
        implementation: str,
        launch: Launch,
        density: float,
        lists: BlockLists | None = None,
        **about: Any,
    ) -> float:
        us = median_ms(launch) * 1e3
        products = HEADS.query_heads * self.grid.total if lists is None else self._products(lists)
        teraflops = 4 * HEADS.head_dim * products / us * 1e-6
        row = {"length": self.length, "implementation": implementation, "operation": "attention"}
        self.report.row(**row, density=density, **about, us=us, teraflops=teraflops)
        return us


def _tokens(heads: int, length: int) -> Tensor:
    shape = (1, length, heads, HEADS.head_dim)
    return torch.randn(shape, device=DEVICE).to(HEADS.dtype).transpose(1, 2)
