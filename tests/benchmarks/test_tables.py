"""KL at equal reads, as the results compare methods."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from specattn.evaluation.fidelity import FidelityResult


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(method: str, option: dict[str, object], document: str, read: float, kl: float) -> FidelityResult:
    return FidelityResult(method, option, document, kl, 0.1, 0.9, 11.0, 10.0, 0.8, read, 0.0)


RESULTS = [
    result("specattn", {"p": 0.8}, "a", 0.1, 0.08),
    result("specattn", {"p": 0.9}, "a", 0.3, 0.02),
    result("specattn", {"p": 0.8}, "b", 0.2, 0.01),
    result("specattn", {"p": 0.9}, "b", 0.4, 0.01),
    result("streaming", {"budget": 0.1}, "a", 0.1, 0.3),
    result("streaming", {"budget": 0.1}, "b", 0.1, 0.3),
]


def test_the_mean_of_two_points_is_geometric(tables: ModuleType) -> None:
    lines = list(tables.at_equal_reads(RESULTS, 0.2))
    assert lines[0] == "| KL at 20% of the reads | a | b | mean |"
    assert lines[2:] == ["| specattn | 0.0400 | 0.0100 | 0.0250 |"]  # streaming has no frontier to read off


def test_nothing_is_read_off_beyond_the_points(tables: ModuleType) -> None:
    assert len(list(tables.at_equal_reads(RESULTS, 0.35))) == 2


def test_a_row_has_the_change_of_perplexity_and_its_interval(tables: ModuleType) -> None:
    lines = list(tables.table(RESULTS, {"kl", "kv_read_fraction"}))
    assert lines[0] == "| method | KV read | KL | perplexity | change, 95 % |"
    assert lines[2] == "| specattn p=0.8 | 0.150 | 0.0450 | 11.000 (+10.00%) | +10.0% to +10.0% |"
