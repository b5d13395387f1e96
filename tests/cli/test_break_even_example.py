"""``examples/break_even.py`` on a tiny pair: every plan has a row, and the one that chooses says what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import load_script


def words(tiny: SimpleNamespace, *more: object) -> list[str]:
    """A run of two draft lengths."""
    sizes = ["--context", 30, "--batch", 2, "--tokens", 12, "--gamma", 1, "--gamma", 2]
    method = ["--method", "specattn:map=global:dense_layers=0:p=0.9"]
    files = ["--text", tiny.text, "--mapping", tiny.mapping]
    return [str(word) for word in (*files, *sizes, *method, *tiny.models, *more)]


def test_every_plan_has_a_row(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "plans.json"
    report = load_script("examples/break_even.py").main(words(tiny, "--out", out))
    assert json.loads(out.read_text()) == report and report["complete"] is True
    rows = report["rows"]
    assert [row["plan"] for row in rows] == [
        "plain",
        "dense, gamma 1",
        "sparse, gamma 1",
        "dense, gamma 2",
        "sparse, gamma 2",
        "chosen",
    ]
    assert all(row["tokens_per_second"] > 0 and (row["context"], row["batch"]) == (30, 2) for row in rows)
    *fixed, chosen = rows
    assert chosen["of_best"] == pytest.approx(
        chosen["tokens_per_second"] / max(row["tokens_per_second"] for row in fixed)
    )
    assert [len(row["rounds"]) for row in fixed] == [1] * 5
    assert len({plan for row in fixed for plan in row["rounds"]}) == 5
    for row in rows:  # the first time counts as well
        assert sum(row["policy"]["rounds"].values()) > sum(row["rounds"].values()) > 0
    assert chosen["policy"]["reason"]


def test_a_text_that_is_too_short_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="are needed"):
        load_script("examples/break_even.py").main(words(tiny, "--context", 10_000_000))
