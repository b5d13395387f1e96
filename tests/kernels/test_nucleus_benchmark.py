"""The benchmark of top-p, without its timings: on the CPU, in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Iterator

import pytest
import torch

from specattn.benchmarks.report import Report
from specattn.selection.base import Selection

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)


@pytest.fixture
def nucleus(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    from specattn.benchmarks import nucleus

    small = (2, 1000)
    for name, value in {"SHAPES": [small], "RATED": [small], "QUICK": [small], "PLACES": 1}.items():
        monkeypatch.setattr(nucleus, name, value)
    monkeypatch.setattr(nucleus, "ROTATED_BYTES", 1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(nucleus, "DEVICE", "cpu")
    monkeypatch.setattr(nucleus, "graph_us", lambda launches: 2.0)
    monkeypatch.setattr(
        nucleus, "sequence_us", lambda launches: len([launch() for launch in launches]) * 50.0
    )
    monkeypatch.setattr(nucleus, "flashinfer_available", lambda: False)
    return nucleus


def test_top_p_is_checked_and_compared(nucleus: types.ModuleType) -> None:
    report = Report()
    nucleus.run(report, bandwidth=8e9, quick=True)
    assert report.gate == "passed"
    assert report.ratios == {"nucleus_vs_sort": 25.0, "nucleus_vs_read": 2.0}
    us = {row["implementation"]: row.get("us", row.get("note")) for row in report.rows}
    assert us == {"read": 1.0, "specattn": 2.0, "sort": 50.0, "flashinfer": "not installed"}


def test_with_flashinfer_there_is_a_ratio(nucleus: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nucleus, "flashinfer_available", lambda: True)
    monkeypatch.setattr(nucleus, "_flashinfer", lambda inputs: [lambda: None])
    report = Report()
    nucleus.run(report, bandwidth=8e9)
    assert report.ratios["nucleus_vs_flashinfer"] == 25.0


def test_wrong_lists_are_found(nucleus: types.ModuleType) -> None:
    from specattn.kernels.nucleus_lists import nucleus_lists

    scores = nucleus.attention_rows(2, 1000, seed=0)
    lengths = torch.full((2,), 1000, device=scores.device)
    forced = {"sink": nucleus.SINK, "recent": nucleus.RECENT}

    def error(p: float, capacity: int = 1000, **forced: int) -> float:
        return nucleus.mass_error(nucleus_lists(scores, p, lengths, capacity=capacity, **forced), scores)

    assert error(nucleus.P, **forced) <= nucleus.BOUND
    assert error(nucleus.P + 0.02, **forced) > nucleus.BOUND
    assert error(nucleus.P - 0.02, **forced) > nucleus.BOUND
    assert error(nucleus.P, capacity=70, **forced) > nucleus.BOUND
    assert not error(0.5) <= nucleus.BOUND  # the recent ones are missing
    good = nucleus_lists(scores, nucleus.P, lengths, capacity=1000, **forced)
    swapped = Selection(good.indices.flip(-1), good.counts)
    miscounted = Selection(good.indices, good.counts - 1)
    other = good.indices.clone()
    other[:, nucleus.SINK : -nucleus.RECENT] = -1
    for bad in (swapped, miscounted, Selection(other, (other >= 0).sum(-1, dtype=torch.int32))):
        assert not nucleus.mass_error(bad, scores) <= nucleus.BOUND
