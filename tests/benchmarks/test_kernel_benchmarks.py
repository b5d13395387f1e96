"""The benchmarks of kernels: what they refuse, and that they run; their timings only a GPU can tell."""

from __future__ import annotations

import types

import pytest
import torch

from specattn.benchmarks import kernels
from specattn.benchmarks.report import Report
from specattn.errors import UsageError


def test_all_operations_by_default() -> None:
    assert kernels.check_operations([]) == kernels.OPERATIONS
    assert kernels.check_operations(["nucleus"]) == ["nucleus"]
    with pytest.raises(UsageError, match=r"'sort'.*nucleus"):
        kernels.check_operations(["nucleus", "sort"])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("triton", "pip install triton"),
        ("gpu", "no CUDA GPU"),
        ("capability", "T4 has compute capability 7.5"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, message: str) -> None:
    found = None if missing == "triton" else types.SimpleNamespace()
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing != "gpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UsageError, match=message):
        kernels.check_gpu()


def test_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    kernels.check_gpu()


def test_operations_run_in_turn_with_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Module:
        @staticmethod
        def run(report: Report, bandwidth: float, quick: bool) -> None:
            seen.append((bandwidth, quick))
            report.row(us=1.0)

    monkeypatch.setattr("specattn.benchmarks.timing.copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(kernels, "import_module", lambda name: Module)
    report = kernels.run(["nucleus", "verify"], quick=True)
    assert seen == [(4e12, True)] * 2
    assert [row["benchmark"] for row in report.rows] == ["nucleus", "verify"]
