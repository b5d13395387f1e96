"""Default tilings keep to what a GPU has, and to the workspace that is allocated for them."""

from __future__ import annotations

import pytest
import torch

from specattn.kernels import default_tilings
from specattn.kernels.default_tilings import NARROW_ROWS, norm_tiling, split_tiling
from specattn.kernels.product_tiling import MOST_ROWS, PROGRAM_PARTS, ProductTiling, tile_rows

CPU = torch.device("cpu")
MULTIPROCESSORS, SHARED = 132, 228 * 1024
ROWS = [1, 16, NARROW_ROWS, NARROW_ROWS + 1, 48, 80, MOST_ROWS]
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
    assert tiling.stages >= 2 and tiling.stages * fetch <= SHARED // 2
    tiles, (parts, _) = -(-outputs // tiling.columns), tiling.cut(channels)
    if parts > 1:
        assert (
            tiles * parts * block * lines <= MULTIPROCESSORS * PROGRAM_PARTS and tiles <= 3 * MULTIPROCESSORS
        )


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
        assert tiling.early == starts_early and (starts_early or (not tiling.described and not tiling.ahead))


def test_many_rows_take_wide_tiles_by_the_tensor_memory_accelerator(starts_early):
    tiling = split_tiling(48, 1536, 8960, CPU)
    assert tiling.columns == 64 and tiling.parts == MULTIPROCESSORS // 24
    assert tiling.described == starts_early
    assert not split_tiling(48, 1536, 8961, CPU).described, "lines of no multiple of 16 bytes"
