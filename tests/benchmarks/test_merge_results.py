"""Parts of an evaluation become one document: what is joined, what is said of it, what is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

from specattn.evaluation.bootstrap import interval
from specattn.report.evaluations import parse_evaluation

PROTOCOL = {"pair": "tiny", "context": 60, "rows": 10, "gamma": 4, "environment": {"dtype": "bfloat16"}}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/merge_results.py")


def row(document: str, p: float, kl: float, dense: float = 20.0) -> dict[str, Any]:
    return {
        "method": "specattn-paper",
        "options": {"p": p},
        "document": document,
        "kl": kl,
        "perplexity": dense * 1.01,
        "perplexity_dense": dense,
        "kv_read_fraction": 0.2,
        "draft_read_fraction": 0.1,
    }


def part(*rows: dict[str, Any], without: tuple[str, ...] = (), **changed: Any) -> dict[str, Any]:
    return {
        **PROTOCOL,
        "documents": list(dict.fromkeys(row["document"] for row in rows)),
        "results": list(rows),
        "intervals": {"specattn-paper p=0.9": {"kl": [0.01, 0.5]}},
        "complete": not without,
        "without_results": list(without),
        **changed,
    }


A, B = part(row("a", 0.9, 0.1)), part(row("b", 0.9, 0.3))
METHOD = "specattn-paper p=0.9"


def test_documents_and_results_are_joined(script: ModuleType) -> None:
    whole = script.merge({"a.json": A, "b.json": B})
    assert whole["results"] == A["results"] + B["results"] and whole["documents"] == ["a", "b"]
    assert whole["complete"] is True and whole["incomplete_parts"] == whole["without_results"] == []
    assert {key: whole[key] for key in PROTOCOL} == PROTOCOL
    assert parse_evaluation(whole, "whole").complete


def test_an_interrupted_part_gives_what_it_has_and_is_named(script: ModuleType) -> None:
    cut = part(row("b", 0.9, 0.3), without=("c",))
    whole = script.merge({"b.json": cut, "a.json": A, "d.json": part(), "e.json": {}})
    assert [entry["document"] for entry in whole["results"]] == ["b", "a"]
    assert whole["complete"] is False and whole["incomplete_parts"] == ["b.json", "d.json", "e.json"]
    assert whole["documents"] == ["b", "a"] and whole["without_results"] == ["c"]


def test_the_same_result_counts_once_of_a_complete_part(script: ModuleType) -> None:
    cut, again = part(row("a", 0.9, 0.2), without=("b",)), part(row("a", 0.9, 0.1), row("b", 0.9, 0.3))
    whole = script.merge({"cut.json": cut, "again.json": again})
    assert whole["results"] == again["results"] and whole["without_results"] == []


def test_intervals_are_kept_or_made_over_all_documents(script: ModuleType) -> None:
    apart = script.merge({"a.json": A, "b.json": part(row("a", 0.8, 0.3))})["intervals"]
    assert apart[METHOD] == {"kl": [0.01, 0.5]}, "over the rounds, which the report does not have"
    together = script.merge({"a.json": A, "b.json": B})["intervals"]
    assert together == {METHOD: {"kl": interval([[0.1, 0.3]])}}


def test_the_spread_of_the_dense_references_is_told(script: ModuleType) -> None:
    rounded = part(row("a", 0.8, 0.2, dense=20.04))
    assert script.merge({"a.json": A, "b.json": B})["reference_spread"] == 0
    assert script.merge({"a.json": A, "b.json": rounded})["reference_spread"] == pytest.approx(2e-3)


@pytest.mark.parametrize(("dtype", "dense"), [("bfloat16", 20.3), ("float32", 20.04)])
def test_another_dense_reference_is_refused(script: ModuleType, dtype: str, dense: float) -> None:
    parts = {"a.json": deepcopy(A), "b.json": part(row("a", 0.8, 0.2, dense=dense))}
    for one in parts.values():
        one["environment"] = {"dtype": dtype}
    with pytest.raises(
        SystemExit, match=r"a.json and b.json have other dense references for 'a'.* 20 and 20\."
    ):
        script.merge(parts)


def test_another_protocol_and_nothing_at_all_are_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"a\.json and b\.json differ in 'rows': 10 and 12"):
        script.merge({"a.json": A, "b.json": B | {"rows": 12}})
    with pytest.raises(SystemExit, match=r"no results in d\.json"):
        script.merge({"d.json": {}})


def test_files_are_read_as_commands_leave_them(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("plain.json", "output.txt", "killed.json")]
    contents = (json.dumps(A, indent=1), f"a warning\n{json.dumps(B)}\n", "")
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    script.main([str(path) for path in paths])
    printed = capsys.readouterr()
    whole = json.loads(printed.out)
    assert whole["documents"] == ["a", "b"] and whole["incomplete_parts"] == [str(paths[2])]
    assert f"incomplete: {paths[2]}" in printed.err and "differ by 0.0e+00 at most" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.json"], "cannot read missing.json: No such file"),
        (["."], "cannot read .: Is a directory"),
        (["--output", "all.json"], "unrecognized arguments: --output"),
        ([], "required: REPORT"),
    ],
)
def test_what_is_no_file_is_refused(
    words: list[str],
    message: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all.json").write_text(json.dumps(A), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        script.main(words)
    printed = capsys.readouterr()
    assert caught.value.code == 2 and message in printed.err and not printed.out


def test_a_file_that_is_no_report_has_no_results(script: ModuleType, tmp_path: Path) -> None:
    for content in (b"a book", b"caf\xe9", b"[1]"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(SystemExit, match=r"no results in .*a\.json"):
            script.main([str(tmp_path / "a.json")])


def test_help_says_what_it_does(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and "REPORT" in printed and "Join the JSON of evaluations" in printed
