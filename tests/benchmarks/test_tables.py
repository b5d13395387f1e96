"""The tables of the results: KL at equal reads, tasks beside dense decoding, what lossless decoding reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from specattn.evaluation.fidelity import FidelityResult


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script("benchmarks/tables.py")


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


def answers(score: float, read: float, **more: object) -> dict[str, object]:
    groups = {
        "16384": {"score": score, "kv_read_fraction": read},
        "4096": {"score": 1.0, "kv_read_fraction": 0.5},
    }
    figures = {"samples": 40, "score": score, "interval": [0.4, 0.6], "kv_read_fraction": read}
    return {**figures, "accepted_mean": 3.0, "groups": groups, "complete": True, **more}


AGAINST = {"samples": 40, "difference": -0.1, "interval": [-0.2, 0.05], "better": 1, "worse": 5}
TASK = {
    "task": "passkey",
    "metric": "accuracy",
    "methods": {
        "dense": answers(0.5, 1.0),
        "quest": answers(0.4, 0.2, against_dense=AGAINST),
        "snapkv": answers(0.9, 0.1, complete=False, against_dense=None),
    },
}


def test_tasks_are_compared_with_dense_answers(tables: ModuleType) -> None:
    dense, quest, snapkv = list(tables.tasks(TASK))[2:]
    assert dense == "| dense | 40 | 0.500 (0.400 to 0.600) |  | 1.000 | 3.00 |"
    assert quest == (
        "| quest budget=0.1 | 40 | 0.400 (0.400 to 0.600) | -0.100 (-0.200 to +0.050) | 0.200 | 3.00 |"
    )
    assert "| incomplete |" in snapkv and "0.9" not in snapkv  # what is missing may be the harder part


def test_groups_stand_in_the_order_of_their_lengths(tables: ModuleType) -> None:
    assert list(tables.task_groups(TASK)) == [
        "| accuracy at reads | dense | quest budget=0.1 |",
        "|---|---|---|",
        "| 4096 | 1.00 at 0.500 | 1.00 at 0.500 |",
        "| 16384 | 0.50 at 1.000 | 0.40 at 0.200 |",
    ]


def test_lossless_tokens_part_with_a_gap(tables: ModuleType) -> None:
    prompts = [
        {"equal": True, "gap_there": None, "tokens_below": 1, "tokens": 96},
        {"equal": False, "gap_there": 0.0, "tokens_below": 0, "tokens": 96},
        {"equal": False, "gap_there": 0.125, "tokens_below": 2, "tokens": 96},
    ]
    row = {"method": "self:p=0.9", "dense_reads_per_token": 0.15, "kv_reads_per_token": 0.4}
    row |= {"acceptance_rate": 0.75, "largest_gap": 0.125, "prompts": prompts}
    (line,) = list(tables.lossless({"results": [row]}))[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "0.150",
        "0.400",
        "0.75",
        "1 of 3",
        "0 in 1, 0.125 in 1",
        "3 of 288, by 0.125 at most",
    ]
    (own,) = tables.own_tables({"command": "lossless_reads", "results": [row]})
    assert list(own)[2:] == [line]


def test_every_document_of_the_results_has_a_table(tables: ModuleType) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    for kind in ("task_*.json", "lossless_*.json"):
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(kind))]
        assert len(found) > 1
        for document in found:
            made = tables.own_tables(document)
            assert made and all(len(list(lines)) > 3 for lines in made)
