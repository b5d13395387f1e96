"""The report of a benchmark: no timing without a check that passed."""

from __future__ import annotations

import json

import pytest

from specattn.benchmarks.report import Report

NAN = float("nan")


def report(*checks: tuple[float, float]) -> Report:
    made = Report()
    for error, bound in checks:
        made.check("what", error, bound)
    made.row(us=3.5)
    made.ratio("speed", 2.0)
    return made


@pytest.mark.parametrize(
    ("checks", "gate"),
    [
        ([], "not run"),
        ([(0.1, 0.1)], "passed"),
        ([(0.1, 0.1), (0.0, 0.0)], "passed"),
        ([(0.2, 0.1)], "failed"),
        ([(0.0, 0.1), (NAN, 0.1), (0.0, 0.1)], "failed"),
        ([(0.1, NAN)], "failed"),
        ([(float("inf"), 1.0)], "failed"),
    ],
)
def test_the_gate_and_what_it_lets_through(checks: list[tuple[float, float]], gate: str) -> None:
    document = report(*checks).document("specattn bench kernels")
    assert list(document) == ["command", "environment", "gate", "rows", "ratios"]
    assert (document["command"], document["gate"]) == ("specattn bench kernels", gate)
    passed = gate == "passed"
    assert document["rows"] == ([{"us": 3.5}] if passed else [])
    assert document["ratios"] == ({"speed": 2.0} if passed else {})
    assert "torch" in document["environment"]
    json.dumps(document, allow_nan=False)


def test_failures_are_named() -> None:
    made = Report()
    made.check("good", 0.0, 1.0)
    made.check("bad", NAN, 1.0)
    assert [check.name for check in made.failures] == ["bad"]


def test_rows_say_which_benchmark_they_are_of() -> None:
    made = Report()
    made.benchmark = "nucleus"
    made.row(us=1.0)
    assert made.rows == [{"benchmark": "nucleus", "us": 1.0}]
