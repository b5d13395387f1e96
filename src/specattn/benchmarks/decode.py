"""Rounds of decoding, timed: plain, dense speculation and sparse speculation on the same models and caches.

Weights and caches are random. So the acceptance rate is imposed: a round that accepts each proposal with probability
``a`` yields ``(1 - a^(gamma+1)) / (1 - a)`` tokens. The density is imposed too: ``p`` is chosen so that the sparse
layers read the wanted share. All else, from sampling to the lists, is what decoding does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from specattn.benchmarks.shapes import PAIRS, random_mapping, random_model
from specattn.fast.graph import CapturedRound
from specattn.fast.model import FastModel
from specattn.fast.round import FastRound
from specattn.mapping.artifact import Mapping
from specattn.runner import ModelRunner
from specattn.sampling import SamplingParams, SamplingState
from specattn.selection.dense import Dense
from specattn.selection.specattn import SpecAttn

ACCEPTANCE = 0.7
HEADS = 64
"""Draft heads that export their scores."""

Median = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Cell:
    """One measurement: a pair at a batch size, a context and a density of the sparse layers."""

    pair: str
    batch: int
    context: int
    density: float
    gamma: int = 4


def expected_tokens(gamma: int, acceptance: float = ACCEPTANCE) -> float:
    """Tokens that a round yields on average."""
    return sum(acceptance**i for i in range(gamma + 1))


@dataclass
class Bench:
    """The models of one pair with caches for one batch and context; every slot is full of random keys and values."""

    target: FastModel
    draft: FastModel
    mapping: Mapping
    batch: int
    context: int

    @classmethod
    def make(cls, pair: str, batch: int, context: int, gamma: int, device: torch.device) -> Bench:
        """Models of the shapes that ``pair`` names."""
        shapes, room = PAIRS[pair], context + gamma + 1
        fast = []
        for shape in (shapes.target, shapes.draft):
            runner = ModelRunner(
                random_model(shape, device), tokens=batch * room, slots=batch, max_length=room
            )
            for pool in (*runner.cache.keys, *runner.cache.values):
                pool.normal_()
            for _ in range(batch):
                runner.cache.allocate(room)
            fast.append(FastModel.of(runner, min(shapes.target.vocab, shapes.draft.vocab)))
        return cls(fast[0], fast[1], random_mapping(shapes, HEADS, device), batch, context)

    def round(self, method: Dense | SpecAttn, gamma: int) -> FastRound:
        """A round of all slots, with its inputs in place."""
        device = self.target.runner.device
        greedy = SamplingState.of([SamplingParams()] * self.batch, device)
        cache = self.target.runner.cache
        round = FastRound(
            self.target,
            self.draft if gamma else None,
            method,
            self.mapping,
            batch=self.batch,
            gamma=gamma,
            sampling=greedy,
            length=cache.block_table.shape[1] * cache.page_size,
        )
        rows = [[slot, self.context, 0, 7 + slot, 11 + slot] for slot in range(self.batch)]
        round.inputs.table.copy_(torch.tensor(rows, device=device))
        return round

    def density(self, round: FastRound) -> float:
        """Share of the context that the sparse layers of a round read."""
        round.run()
        assert round.selector is not None
        layers = self.target.runner.geometry.layers
        counts = round.selector.lists.counts.view(self.batch, layers, -1)[:, round.method.dense_layers :]
        return float(counts.float().mean()) / self.context

    def sparse(self, density: float, gamma: int) -> FastRound:
        """A sparse round whose ``p`` gives this density, to a few per cent."""
        low, high = 0.0, 1.0
        for _ in range(8):
            p = (low + high) / 2
            round = self.round(SpecAttn(p=p, map="global"), gamma)
            found = self.density(round)
            if abs(found / density - 1) < 0.03:
                break
            low, high = (p, high) if found < density else (low, p)
        return round


@torch.inference_mode()
def measure(cells: Sequence[Cell], median_ms: Median, device: torch.device) -> list[dict[str, object]]:
    """A row for each cell: milliseconds a round and tokens a second of the three ways to decode."""
    rows = []
    for cell in cells:
        bench = Bench.make(cell.pair, cell.batch, cell.context, cell.gamma, device)
        memory = torch.cuda.graph_pool_handle()

        def timed(round: FastRound, memory: Any = memory) -> float:
            return median_ms(CapturedRound(round.run, memory))

        sparse = bench.sparse(cell.density, cell.gamma)
        found = bench.density(sparse)
        times = {
            "plain": timed(bench.round(Dense(), 0)),
            "dense": timed(bench.round(Dense(), cell.gamma)),
            "sparse": timed(sparse),
        }
        rows.append(_row(replace(cell, density=found), times))
        del bench, sparse
        torch.cuda.empty_cache()
    return rows


def _row(cell: Cell, times: dict[str, float]) -> dict[str, object]:
    yields = {"plain": 1.0, "dense": expected_tokens(cell.gamma), "sparse": expected_tokens(cell.gamma)}
    speeds = {name: cell.batch * yields[name] / time * 1000 for name, time in times.items()}
    return {
        "pair": cell.pair,
        "batch": cell.batch,
        "context": cell.context,
        "density": cell.density,
        "gamma": cell.gamma,
        "acceptance": ACCEPTANCE,
        **{f"{name}_ms": time for name, time in times.items()},
        **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
        "vs_speculation": speeds["sparse"] / speeds["dense"],
        "vs_plain": speeds["sparse"] / speeds["plain"],
    }
