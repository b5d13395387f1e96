"""Reports of evaluations as a report reads them."""

from __future__ import annotations

import math

import pytest
from report_runs import evaluation, row

from specattn.errors import UsageError
from specattn.report.evaluations import is_yardstick, join, parse_evaluation


def test_results_and_protocol() -> None:
    found = parse_evaluation(evaluation([row("streaming", 0.2, 0.1, budget=0.2)]), "run.json")
    assert found.protocol == {"pair": "tiny", "context": 4096, "rows": 255, "gamma": 4}
    assert found.documents == ("book",) and found.has_divergence and found.complete
    assert found.results[0].kl == 0.1 and found.results[0].options == {"budget": 0.2}


def test_perplexity_reports_hold_fewer_figures() -> None:
    short = {name: value for name, value in row("streaming", 0.2, 0.1).items() if name != "kl"}
    found = parse_evaluation(evaluation([short]), "run.json")
    assert not found.has_divergence
    assert math.isnan(found.results[0].kl) and found.results[0].perplexity == 11.0


def test_figures_of_a_later_version_are_left_out() -> None:
    found = parse_evaluation(evaluation([row("dense", 1.0, 0.0) | {"of_the_future": 3}]), "run.json")
    assert found.raw[0]["of_the_future"] == 3 and found.results[0].kl == 0.0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"results": []}, "no 'pair'"),
        (evaluation([]), "holds no results"),
        (evaluation([row("dense", 1.0, 0.0), {"method": "dense"}]), "result 2 has no 'options'"),
        (evaluation([row("no-such-method", 1.0, 0.0)]), "no-such-method"),
        (evaluation(["dense"]), "result 1 is not an object"),  # type: ignore[list-item]
    ],
)
def test_what_is_refused(document: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_evaluation(document, "run.json")


def test_evaluations_of_one_protocol_become_one() -> None:
    one = parse_evaluation(evaluation([row("dense", 1.0, 0.1)]), "one.json")
    two = parse_evaluation(
        evaluation([row("dense", 1.0, 0.3), row("oracle", 0.2, 0.2)], complete=False), "two.json"
    )
    other = parse_evaluation(evaluation([row("dense", 1.0, 0.1)], context=8192), "other.json")
    joined = join([one, other, two])
    assert [part.protocol["context"] for part in joined] == [4096, 8192]
    assert [(result.method, result.kl) for result in joined[0].results] == [("dense", 0.1), ("oracle", 0.2)]
    assert [part.complete for part in joined] == [False, True]


@pytest.mark.parametrize(
    ("label", "free"),
    [
        ("dense", True),
        ("oracle p=0.9", True),
        ("topk budget=0.1", True),
        ("vattention base=topk:budget=0.02 eps=0.1", True),
        ("twilight base=dense p=0.9", False),
        ("specattn p=0.9", False),
    ],
)
def test_yardsticks(label: str, free: bool) -> None:
    assert is_yardstick(label) is free
