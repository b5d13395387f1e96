"""The benchmark of block-sparse attention, small and without its timings: interpreted, or on a GPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

from specattn.benchmarks.report import Report
from specattn.geometry import KVGeometry

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

CUDA = torch.cuda.is_available()


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from torch.nn.attention import SDPBackend

    from specattn.benchmarks import prefill as module

    small = {
        # The interpreter has no products of bfloat16.
        "HEADS": KVGeometry(1, 2, 1, 32, torch.bfloat16 if CUDA else torch.float16),
        "SCALING": 32**-0.5,
        "DEVICE": "cuda" if CUDA else "cpu",
        "LENGTHS": [200],
        "DENSITIES": [1.0, 0.5],
        "PEERS": {"math": SDPBackend.MATH},
        "SWEEP": module.SWEEP[::3],
        "median_ms": lambda launch: launch() is not None and 2.0,
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_everything_is_checked_and_compared(prefill: ModuleType) -> None:
    report = Report()
    prefill.run(report, bandwidth=1.0)
    assert not report.failures and report.gate == "passed"
    assert report.ratios == {"prefill_200_1": 1.0, "prefill_200_0.5": 1.0, "prefill_200_both": 1.0}
    assert len(report.checks) == 6
    attention = [row for row in report.rows if row["operation"] == "attention"]
    assert [row["implementation"] for row in attention] == ["math"] + ["specattn"] * 5
    dense = 4 * 32 * 2 * 200 * 201 / 2 / 2000e-6 * 1e-12
    assert attention[0]["teraflops"] == attention[1]["teraflops"] == pytest.approx(dense)
    assert attention[3]["teraflops"] < dense
    assert float(attention[1]["skipped"]) == 0 < float(attention[-1]["skipped"])


def test_a_peer_that_refuses_is_named(prefill: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, backend: object) -> None:
        raise RuntimeError("no such kernel\nbecause")

    monkeypatch.setattr(prefill.Bench, "_dense", refuse)
    report = Report()
    prefill.Bench(report, 200).peers()
    assert report.rows == [{"length": 200, "implementation": "math", "note": "no such kernel"}]


def test_wrong_attention_is_found(prefill: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = prefill.block_sparse_attention

    def wrong(*arguments, start, **options):
        return kernel(*arguments, start=None, **options)

    monkeypatch.setattr(prefill, "block_sparse_attention", wrong)
    report = Report()
    prefill.Bench(report, 200).sparse(1.0)
    assert report.gate == "failed"


def test_a_sweep_times_each_tiling(prefill: ModuleType) -> None:
    report = Report()
    prefill.run(report, bandwidth=1.0, sweep=True)
    assert report.gate == "passed" and not report.ratios
    assert [row["tiling"] for row in report.rows] == [
        str(tiling) for tiling in prefill.SWEEP for _ in range(2)
    ]
