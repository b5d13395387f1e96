"""How lists are shared among programs: each entry is read once, by stretches as short as can be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from specattn.errors import UsageError
from specattn.kernels.schedule import schedule
from specattn.kernels.tiling import Tiling, Workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 16


def workspace(batch: int, kv_heads: int, programs: int, rows: int = 1) -> Workspace:
    return Workspace.allocate(
        batch=batch,
        rows=rows,
        query_heads=16 * kv_heads,
        kv_heads=kv_heads,
        head_dim=64,
        dtype=torch.bfloat16,
        device=DEVICE,
        tiling=Tiling(tokens=TOKENS, programs=programs),
    )


def tiles_of(counts: torch.Tensor) -> torch.Tensor:
    return (-(-counts // TOKENS)).clamp(min=1)


def least_stretch(tiles: torch.Tensor, programs: int) -> int:
    """The least length of stretches with which there are enough programs, found by trying."""
    return next(length for length in range(1, 1 << 20) if int((-(-tiles // length)).sum()) <= programs)


@pytest.mark.parametrize("programs", [1, 2, 9, 40])
@pytest.mark.parametrize("batch,kv_heads,rows", [(1, 1, 1), (3, 2, 1), (5, 3, 9), (16, 2, 1)])
def test_each_entry_is_read_once_and_no_stretch_is_longer_than_needed(batch, kv_heads, rows, programs):
    generator = torch.Generator().manual_seed(batch * programs)
    counts = torch.randint(0, 700, (batch, 3, kv_heads), generator=generator, dtype=torch.int32).to(DEVICE)
    counts[0, 1, 0] = 0
    space = workspace(batch, kv_heads, programs, rows)
    plan = schedule(counts, space, listed=True)
    cut = space.listed
    assert plan.stretches.shape[:2] == (3, cut.programs)
    for layer in range(3):
        rows_of = [row[:7] for row in plan.of_layer(layer).stretches.tolist() if row[0] >= 0]
        idle = plan.of_layer(layer).stretches[len(rows_of) :, 0]
        assert (idle == -1).all()
        entries = counts[:, layer].cpu().flatten().repeat_interleave(cut.blocks)
        tiles = tiles_of(entries)
        longest = least_stretch(tiles, cut.programs)
        place = 0
        for unit, (count, needed) in enumerate(zip(entries.tolist(), tiles.tolist(), strict=True)):
            parts = -(-needed // longest)
            request, head = divmod(unit // cut.blocks, kv_heads)
            own = rows_of[place : place + parts]
            assert [row[0] for row in own] == [unit] * parts
            assert all(row[3:] == [place, parts, request, head] for row in own)
            assert own[0][1] == 0 and own[-1][2] == count
            assert all(one[2] == other[1] for one, other in pairwise(own))
            assert all(row[1] % TOKENS == 0 and row[2] - row[1] <= longest * TOKENS for row in own)
            assert all(row[1] < row[2] for row in own) or own == [[unit, 0, 0, place, 1, request, head]]
            place += parts
        assert place == len(rows_of) <= cut.programs


def test_lists_of_another_batch_are_refused():
    counts = torch.ones(2, 1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(UsageError, match="2 x 2 lists do not fit a workspace for 6"):
        schedule(counts, workspace(3, 2, 4), listed=True)
