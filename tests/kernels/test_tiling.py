"""The numbers of a launch."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels.tiling import Tiling, Workspace, default_tiling, list_tiling, partition

KILOBYTE = 1024
H200, A100, RTX_4090 = 228 * KILOBYTE, 164 * KILOBYTE, 100 * KILOBYTE
CPU = torch.device("cpu")


def cut(rows, group, head_dim, batch=2, kv_heads=4, tiling=None):
    return partition(
        batch, rows, group * kv_heads, kv_heads, head_dim, torch.bfloat16, CPU, tiling, listed=False
    )


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8, 14])
def test_a_round_of_a_group_is_one_tile(rows, group):
    launch = cut(rows, group, 128)
    assert launch.block_m >= max(16, rows * group)
    assert launch.units == 2 * 4


@pytest.mark.parametrize(
    "rows,group,head_dim,blocks", [(9, 16, 128, 2), (64, 4, 80, 2), (9, 8, 256, 2), (2, 1, 512, 1)]
)
def test_more_rows_are_cut_into_blocks(rows, group, head_dim, blocks):
    launch = cut(rows, group, head_dim)
    assert launch.units == 2 * 4 * blocks
    assert launch.block_m * blocks >= rows * group


def test_a_tiling_is_taken_as_it_is():
    tiling = Tiling(tokens=32, warps=8, stages=2, programs=10, rows=64)
    launch = cut(1, 4, 128, tiling=tiling)
    assert launch.tiling == tiling and launch.block_m == 64 and launch.programs == 10


def test_a_larger_batch_needs_a_larger_workspace():
    shape = {
        "rows": 5,
        "query_heads": 16,
        "kv_heads": 4,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "device": CPU,
    }
    workspaces = [Workspace.allocate(batch=batch, **shape) for batch in (1, 2, 16)]
    for sizes in ([w.parts.numel() for w in workspaces], [w.arrivals.numel() for w in workspaces]):
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("shared", [H200, A100, RTX_4090])
@pytest.mark.parametrize(
    "block_m,block_d", [(16, 64), (16, 128), (32, 128), (64, 128), (128, 128), (16, 256)]
)
def test_a_tile_is_fetched_while_another_is_used(shared, block_m, block_d):
    tiling = default_tiling(block_m, block_d, 2, shared)
    assert tiling.stages >= 3
    assert tiling.programs * (tiling.stages - 1) * 2 * tiling.tokens * block_d * 2 < shared


def test_more_memory_is_used_for_a_deeper_pipeline():
    assert default_tiling(32, 128, 2, H200) == Tiling(tokens=64, warps=4, stages=4, programs=2, rows=32)
    assert default_tiling(32, 128, 2, A100).stages == 3
    assert default_tiling(32, 128, 2, RTX_4090).tokens == 32


@pytest.mark.parametrize("shared", [H200, A100, RTX_4090])
@pytest.mark.parametrize("units", [1, 8, 1000])
@pytest.mark.parametrize("block_m,block_d", [(16, 64), (32, 128), (16, 256), (128, 128)])
def test_tiles_of_lists_fit_too(shared, units, block_m, block_d):
    tiling = list_tiling(default_tiling(block_m, block_d, 2, shared), units, block_d, 2, 132, shared)
    assert tiling.stages >= 2 and tiling.rows == block_m
    assert tiling.programs * (tiling.stages - 1) * 2 * tiling.tokens * block_d * 2 < shared


def test_few_lists_have_large_programs_and_others_many():
    wide, narrow = default_tiling(32, 128, 2, H200), default_tiling(16, 64, 2, H200)
    assert list_tiling(wide, 8, 128, 2, 132, H200).programs == 1
    assert list_tiling(wide, 128, 128, 2, 132, H200).programs == 4
    assert list_tiling(wide, 8, 128, 2, 132, RTX_4090).programs == 2
    assert list_tiling(narrow, 8, 64, 2, 132, H200).programs == 2
    assert list_tiling(narrow, 128, 64, 2, 132, H200).programs == 4


def test_many_rows_have_warps_for_them():
    few, many = default_tiling(32, 128, 2, H200), default_tiling(64, 128, 2, H200)
    assert list_tiling(few, 128, 128, 2, 132, H200).warps == 2
    assert list_tiling(many, 128, 128, 2, 132, H200).warps == 4
    assert list_tiling(default_tiling(128, 128, 2, H200), 128, 128, 2, 132, H200).warps == 8


def test_one_workspace_serves_lists_and_all_tokens():
    workspace = Workspace.allocate(
        batch=3, rows=5, query_heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device=CPU
    )
    for cut in (workspace.listed, workspace.dense):
        parts, lses = workspace.views(cut)
        assert parts.numel() == cut.programs * cut.block_m * cut.block_d
        assert lses.numel() == cut.programs * cut.block_m
