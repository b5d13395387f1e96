"""Default tilings keep to what a GPU has, and to the workspace that is allocated for them."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels import default_tilings
from specattn.kernels.default_tilings import NARROW_ROWS, norm_tiling, split_tiling
from specattn.kernels.product_tiling import MOST_ROWS, PROGRAM_PARTS, ProductTiling, tile_rows

CPU = torch.device("cpu")
MULTIPROCESSORS, SHARED = 132, 228 * 1024
ROWS = [1, 16, NARROW_ROWS, NARROW_ROWS + 1, 48, MOST_ROWS]
HOPPER, AMPERE = True, False


@pytest.fixture(params=[HOPPER, AMPERE])
def starts_early(request, monkeypatch) -> bool:
    """A GPU of 132 multiprocessors."""
    monkeypatch.setattr(default_tilings, "programs", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(default_tilings, "shared_memory", lambda device: SHARED)
    monkeypatch.setattr(default_tilings, "starts_early", lambda device: request.param)
    return request.param


def check(tiling: ProductTiling, rows: int, outputs: int, lines: int, channels: int) -> None:
    block = tile_rows(rows)
    fetch = tiling.depth * (block + lines) * 2
    assert tiling.stages >= 2 and tiling.stages * fetch <= SHARED
    tiles, (parts, _) = -(-outputs // tiling.columns), tiling.cut(channels)
    if parts > 1:
        assert tiles * parts * block * lines <= MULTIPROCESSORS * PROGRAM_PARTS
        assert tiles <= 3 * MULTIPROCESSORS


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden,width", [(896, 4864), (1536, 8960), (2048, 8192), (4096, 14336), (64, 200)])
def test_tilings_fit(starts_early, rows, hidden, width):
    tiling = norm_tiling(rows, hidden + 512, hidden, CPU)
    check(tiling, rows, hidden + 512, tiling.columns, hidden)
    gated = norm_tiling(rows, width, hidden, CPU, is_gated=True)
    assert gated.parts == 1
    check(gated, rows, width, 2 * gated.columns, hidden)
    for channels in (hidden, width):
        tiling = split_tiling(rows, hidden, channels, CPU)
        check(tiling, rows, hidden, tiling.columns, channels)
        assert tiling.early == starts_early and (starts_early or not tiling.described)


def summary(tiling: ProductTiling) -> tuple[int, ...]:
    return tiling.columns, tiling.depth, tiling.warps, tiling.stages, tiling.parts, tiling.described


@pytest.mark.parametrize("starts_early", [HOPPER], indirect=True)
@pytest.mark.parametrize("rows,out", [(16, (32, 128, 4, 4, 3, 1)), (48, (16, 128, 4, 4, 1, 1))])
def test_a_layer_of_93_mb_takes_what_was_fastest(starts_early, rows, out):
    assert summary(norm_tiling(rows, 2048, 1536, CPU)) == (32, 128, 4, 6, 1, 1)
    assert summary(norm_tiling(rows, 8960, 1536, CPU, is_gated=True)) == (64, 64, 8, 4, 1, 1)
    assert summary(split_tiling(rows, 1536, 1536, CPU)) == out
    assert summary(split_tiling(rows, 1536, 8960, CPU)) == (64, 64, 4, 8, 5, 0)


@pytest.mark.parametrize("starts_early", [HOPPER], indirect=True)
def test_a_layer_of_30_mb_gives_most_multiprocessors_something(starts_early):
    def launched(tiling: ProductTiling, outputs: int, channels: int) -> int:
        return -(-outputs // tiling.columns) * tiling.cut(channels)[0]

    assert summary(norm_tiling(16, 4864, 896, CPU, is_gated=True)) == (32, 128, 4, 4, 1, 0)
    for rows in (16, 32, 48):
        assert launched(norm_tiling(rows, 1152, 896, CPU), 1152, 896) == 72
        assert launched(norm_tiling(rows, 4864, 896, CPU, is_gated=True), 4864, 896) == 152
        assert launched(split_tiling(rows, 896, 896, CPU), 896, 896) >= 100
        assert launched(split_tiling(rows, 896, 4864, CPU), 896, 4864) >= 130


def test_lines_of_no_multiple_of_16_bytes_are_not_described(starts_early):
    assert not norm_tiling(48, 2048, 1537, CPU).described


@pytest.mark.parametrize("early", [False, True])
def test_what_launches_are_told(early):
    tiling = ProductTiling(columns=32, depth=64, warps=8, stages=3, early=early, described=True)
    told = {"BLOCK_K": 64, "DESCRIBED": True, "EARLY": early, "num_warps": 8, "num_stages": 3}
    assert tiling.options == told | ({"launch_pdl": True} if early else {})
