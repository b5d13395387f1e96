"""``specattn bench``: refusals, the document, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import document, run

from specattn.benchmarks import kernels
from specattn.benchmarks.report import Report


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report that a run will give, without a GPU."""
    report = Report()

    def pretend(operations: list[str], *, quick: bool) -> Report:
        report.benchmark = operations[0]
        report.row(implementation="specattn", us=12.5, quick=quick)
        report.ratio("speed", 3.0)
        return report

    monkeypatch.setattr(kernels, "check_gpu", lambda: None)
    monkeypatch.setattr(kernels, "run", pretend)
    return report


def test_timings_after_a_check_that_passed(bench: Report, tmp_path: Path) -> None:
    bench.check("lists", 0.0, 1e-5)
    out = tmp_path / "kernels.json"
    result = run("bench", "kernels", "--op", "nucleus", "--quick", "--json", "--out", out)
    found = document(result)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert found["command"] == "specattn bench kernels --op nucleus --quick"
    assert found["gate"] == "passed" and found["ratios"] == {"speed": 3.0}
    assert found["rows"] == [
        {"benchmark": "nucleus", "implementation": "specattn", "us": 12.5, "quick": True}
    ]
    assert len(result.stdout.splitlines()) == 1
    for part in ("nucleus", "12.5", "speed: 3.00", "passed"):
        assert part in result.stderr, part


def test_no_timings_after_one_that_failed(bench: Report, tmp_path: Path) -> None:
    bench.check("lists", float("nan"), 1e-5)
    out = tmp_path / "kernels.json"
    result = run("bench", "kernels", "--json", "--out", out)
    assert result.exit_code == 1
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["gate"], found["rows"], found["ratios"]) == ("failed", [], {})
    assert json.loads(result.stdout) == found
    assert "failed: lists: error nan" in result.stderr and "12.5" not in result.stderr


def test_no_timings_without_a_check(bench: Report) -> None:
    result = run("bench", "kernels", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["gate"] == "not run"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    result = run("bench", "kernels")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--op sort", "unknown operation 'sort'"),
        ("--out missing/file.json", "the folder missing does not exist"),
    ],
)
def test_refusals_come_before_the_gpu_is_asked(arguments: str, message: str) -> None:
    result = run("bench", "kernels", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
