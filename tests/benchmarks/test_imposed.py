"""Imposed densities: lists of the wanted length from the nucleus that decoding runs, and refusals."""

from __future__ import annotations

import pytest
import torch

from specattn.benchmarks.imposed import check_density, imposed_nucleus
from specattn.errors import UsageError
from specattn.kernels.nucleus_lists_reference import nucleus_lists_reference
from specattn.selection.base import Selection

BATCH, LISTS, WIDTH, VISIBLE, SINK, RECENT = 2, 5, 320, 307, 4, 21


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("p", [0.8, 0.95, 1 - 1e-3])
def test_every_list_has_the_share_of_the_context(density: float, p: float) -> None:
    torch.manual_seed(0)
    nucleus = imposed_nucleus(
        nucleus_lists_reference,
        lists=(BATCH, LISTS),
        width=WIDTH,
        visible=VISIBLE,
        density=density,
        p=p,
        sink=SINK,
        recent=RECENT,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    out = Selection(
        torch.full((BATCH, LISTS, WIDTH), -7, dtype=torch.int32),
        torch.full((BATCH, LISTS), -7, dtype=torch.int32),
    )
    given = torch.full((BATCH, LISTS, WIDTH), float("nan"))  # what the draft says does not count
    lengths = torch.full((BATCH,), VISIBLE, dtype=torch.int32)
    nucleus(given, p, lengths, capacity=WIDTH, sink=SINK, recent=RECENT, out=out)
    count = max(round(density * VISIBLE), SINK + RECENT)
    assert out.counts.tolist() == [[count] * LISTS] * BATCH
    mask = out.to_mask(WIDTH)
    assert mask[..., :SINK].all() and mask[..., VISIBLE - RECENT : VISIBLE].all()
    assert not mask[..., VISIBLE:].any()
    if count > SINK + RECENT:
        lists = {tuple(indices) for indices in out.indices.flatten(0, 1).tolist()}
        assert len(lists) == BATCH * LISTS, "each head reads other tokens"


@pytest.mark.parametrize(
    ("density", "p", "message"),
    [
        (0.0, 0.95, "density 0 must lie between 0 and 1"),
        (1.0, 0.95, "density 1 must lie between 0 and 1"),
        (0.9, 0.95, r"0\.9 cannot be imposed with p=0\.95"),
        (0.2, 0.3, r"0\.2 cannot be imposed with p=0\.3"),
    ],
)
def test_refusals(density: float, p: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_density(density, p)


def test_usual_densities_pass() -> None:
    for density in (0.02, 0.1, 0.2, 0.5):
        check_density(density, 0.95)
