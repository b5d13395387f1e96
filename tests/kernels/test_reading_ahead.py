"""Attention that reads its lists while the launch before it, which makes queries and new keys and values, still runs.

Only a GPU of Hopper's kind does so; elsewhere the same chain runs one launch after the other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specattn.kernels import linear_add, norm_linear
from specattn.kernels.check import error_ratio
from specattn.kernels.normed_rows import NormedRows
from specattn.kernels.paged_reference import sparse_paged_attention_reference
from specattn.kernels.schedule import schedule
from specattn.kernels.tiling import Tiling, Workspace
from specattn.selection.base import Selection

fused = pytest.importorskip("specattn.kernels.norm_rope_linear_triton")
added = pytest.importorskip("specattn.kernels.linear_add_triton")
paged = pytest.importorskip("specattn.kernels.paged_attention")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter has no bfloat16 products
BOUND = 2e-2 if CUDA else 1e-5
QUERY_HEADS, KV_HEADS, HEAD_DIM, CHANNELS, PAGE, REPLAYS = 6, 2, 32, 64, 16, 5
HELD = [40, 3, 150]
"""Tokens that requests have before the pass."""


class Chain:
    """Layers of ``[norm_rope_linear, attention, linear_add]`` over lists that hold the pass's own tokens."""

    def __init__(self, rows: int, layers: int = 2) -> None:
        self.rows, self._seed = rows, 0
        batch, width = len(HELD), (max(HELD) + 2 * rows) // PAGE + 1
        outputs = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
        pages = torch.randperm(batch * width, generator=torch.Generator().manual_seed(0))
        self.block_table = pages.int().view(batch, width).to(DEVICE)
        self.slots = torch.arange(batch, device=DEVICE).flip(0)
        self.starts = torch.tensor(HELD, device=DEVICE)
        self.angles = self.randn(batch * width * PAGE, HEAD_DIM).float()
        shape = (batch * width * PAGE, KV_HEADS, HEAD_DIM)
        self.layers = [
            (
                self.randn(outputs, CHANNELS),
                self.randn(outputs),
                self.randn(*shape),
                self.randn(*shape),
                self.randn(CHANNELS, QUERY_HEADS * HEAD_DIM),
            )
            for _ in range(layers)
        ]
        self.gain, self.x = self.randn(CHANNELS), self.randn(batch * rows, CHANNELS)
        capacity = max(HELD) + 2 * rows
        self.lists = Selection(
            torch.full((batch, layers, KV_HEADS, capacity), -1, dtype=torch.int32, device=DEVICE),
            torch.zeros(batch, layers, KV_HEADS, dtype=torch.int32, device=DEVICE),
        )
        self.workspace = Workspace.allocate(
            batch=batch,
            rows=rows,
            query_heads=QUERY_HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=DTYPE,
            device=DEVICE,
            tiling=Tiling(tokens=16, stages=3),
        )

    def randn(self, *shape: int) -> Tensor:
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        return (0.3 * torch.randn(*shape, generator=generator)).to(DEVICE, DTYPE)

    def change(self) -> None:
        """Other rows and other lists, some of them empty but for the rows' own tokens."""
        self.x.copy_(self.randn(*self.x.shape))
        mask = torch.zeros(*self.lists.indices.shape, dtype=torch.bool, device=DEVICE)
        token = torch.arange(mask.shape[-1], device=DEVICE)
        chosen = self.randn(*mask.shape) > 0.2
        ends = self.starts[:, None, None, None]
        mask |= chosen & (token < ends) | (token >= ends) & (token < ends + self.rows)
        mask[0, 0, 0] = False
        listed = Selection.from_mask(mask)
        # Behind a list lies what must not be followed.
        self.lists.indices.fill_(2**30)
        self.lists.indices[..., : listed.indices.shape[-1]] = listed.indices.where(
            listed.indices >= 0, torch.full_like(listed.indices, 2**30)
        )
        self.lists.counts.copy_(listed.counts)

    def run(self, pools: list[tuple[Tensor, Tensor]], *, reference: bool, settled: bool = False) -> Tensor:
        positions = self.starts[:, None] + torch.arange(self.rows, device=DEVICE)
        pages = self.block_table[self.slots].gather(1, positions // PAGE).long()
        places = (pages * PAGE + positions % PAGE).flatten()
        # Longer than the lists are, as the lists of a draft's earlier steps are.
        plan = schedule(self.lists.counts + 3, self.workspace, listed=True)
        new = (self.angles.cos(), self.angles.sin(), positions.flatten(), places)
        product = norm_linear.norm_rope_linear if reference else fused.norm_rope_linear
        add = linear_add.linear_add if reference else added.linear_add
        attend = sparse_paged_attention_reference if reference else paged.sparse_paged_attention
        total, normed = self.x, NormedRows(self.x * 1)
        for number, ((weight, bias, _, _, out), pool) in enumerate(zip(self.layers, pools, strict=True)):
            query = product(normed, weight, bias, *new, *pool).view(
                len(HELD), self.rows, QUERY_HEADS, HEAD_DIM
            )
            lists = self.lists.of_layer(number)
            own = {} if reference else {"schedule": plan.of_layer(number), "workspace": self.workspace}
            place = (self.block_table, self.slots, lists, positions, 0.4, PAGE)
            attended = attend(query, *pool, *place, **own, **({} if reference else {"settled": settled}))
            total, normed = add(attended.flatten(0, 1).flatten(1), out, None, total, self.gain, 1e-6)
        return total

    def pools(self) -> list[tuple[Tensor, Tensor]]:
        return [(keys.clone(), values.clone()) for _, _, keys, values, _ in self.layers]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_chain_that_reads_ahead_is_like_its_reference(rows: int) -> None:
    chain = Chain(rows)
    chain.change()
    expected = chain.run(chain.pools(), reference=True)
    found = [chain.run(chain.pools(), reference=False, settled=settled) for settled in (False, True)]
    assert error_ratio(found[1], expected) < BOUND
    assert torch.equal(*found)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("rows", [1, 5])
def test_so_is_a_graph_whose_inputs_change(rows: int) -> None:
    chain = Chain(rows)
    pools = chain.pools()
    chain.change()
    chain.run(pools, reference=False, settled=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain.run(pools, reference=False, settled=True)
    for _ in range(REPLAYS):
        chain.change()
        graph.replay()
        assert error_ratio(found, chain.run(chain.pools(), reference=True)) < BOUND


@pytest.mark.parametrize("change", ["nothing", "no schedule", "strided positions"])
def test_nothing_is_read_ahead_that_a_call_makes_itself(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(2)
    chain.change()
    ways = []
    monkeypatch.setattr(paged, "starts_early", lambda device: True)
    monkeypatch.setattr(paged, "_launch", lambda *given: ways.append(given[-1]))
    query = chain.randn(len(HELD), 2, QUERY_HEADS, HEAD_DIM)
    positions = chain.starts[:, None] + torch.arange(2, device=DEVICE)
    if change == "strided positions":
        positions = positions.T.contiguous().T
    lists = chain.lists.of_layer(0)
    plan = schedule(lists.counts[:, None], chain.workspace, listed=True).of_layer(0)
    place = (chain.block_table, chain.slots, lists, positions, 0.4, PAGE)
    own: dict[str, object] = {
        "schedule": None if change == "no schedule" else plan,
        "workspace": chain.workspace,
    }
    paged.sparse_paged_attention(query, *chain.pools()[0], *place, settled=True, **own)
    assert ways == [change == "nothing"]
