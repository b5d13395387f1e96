"""``specattn eval`` on files in the form of published benchmarks, and reports of the runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, run

METHODS = "dense,streaming:budget=0.3"


@pytest.fixture
def ask(tiny: SimpleNamespace, tmp_path: Path):
    def call(task: str, *arguments: object):
        where = ["--run", tmp_path / f"run-{task}", *tiny.models]
        return run("eval", task, *where, "--methods", METHODS, *arguments, "--json")

    return call


def write(folder: Path, name: str, *rows: dict[str, object]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_longbench(ask, tmp_path: Path) -> None:
    row = {"context": "x = 1\ny = 2\n" * 60, "input": "", "answers": ["z = 3"]}
    write(tmp_path, "lcc.jsonl", row, row)
    report = document(ask("longbench", "--data", tmp_path, "--dataset", "lcc", "--longest", 200))
    assert report["config"]["options"]["datasets"] == ["lcc"] and report["metric"] == "score"
    for figures in report["methods"].values():
        assert figures["samples"] == 2 and list(figures["groups"]) == ["lcc"]


def test_longbench2(ask, tmp_path: Path) -> None:
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    row = {"_id": "a", "context": "x" * 900, "question": "?", "answer": "A", "length": "short", **choices}
    path = write(tmp_path, "two.jsonl", row, {**row, "_id": "b", "length": "long"})
    report = document(ask("longbench2", "--data", path, "--length", "short", "--by", "length"))
    assert report["methods"]["dense"]["samples"] == 1
    assert list(report["methods"]["dense"]["groups"]) == ["short"]


def test_infinitebench(ask, tmp_path: Path) -> None:
    row = {"context": "y" * 900, "input": "What?", "answer": ["1"], "options": []}
    write(tmp_path, "passkey.jsonl", row)
    report = document(ask("infinitebench", "--data", tmp_path, "--task", "passkey"))
    assert report["methods"]["dense"]["samples"] == 1


def test_specbench_shows_every_category(ask, tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "category": name, "turns": ["Say it."]} for n, name in enumerate(["math", "qa"])
    ]
    result = ask("specbench", "--data", write(tmp_path, "question.jsonl", *rows), "--max-new-tokens", 8)
    groups = document(result)["methods"]["dense"]["groups"]
    assert "specbench: speed" in result.stderr and "score" not in result.stderr
    assert set(groups) == {"mt_bench", "qa"}
    for name, figures in groups.items():
        assert name in result.stderr and f"{figures['accepted_mean'] + 1:.2f}" in result.stderr


def test_a_report_of_task_runs(ask, tmp_path: Path) -> None:
    grid = ["--length", 350, "--length", 450, "--depth", 0, "--depth", 100, "--samples", 1]
    needle = document(ask("needle", *grid))
    rows = [{"question_id": 1, "category": "qa", "turns": ["Say it."]}]
    document(ask("specbench", "--data", write(tmp_path, "question.jsonl", *rows), "--max-new-tokens", 8))
    out = tmp_path / "page.html"
    folders = [tmp_path / "run-needle", tmp_path / "run-specbench"]
    result = run("report", *folders, "--out", out, "--markdown")
    assert result.exit_code == 0, result.stderr
    page, tables = out.read_text(encoding="utf-8"), out.with_suffix(".md").read_text(encoding="utf-8")
    for method in needle["methods"]:
        assert f"{method}: accuracy by depth and length" in page
        assert f"| {method} | {needle['methods'][method]['score']:.1%} |" in tables
    assert page.count('class="cell"') == 2 * 2 * 2
    assert "## Task specbench" in tables and "accepted on average" in tables
    specbench = tables.partition("## Task specbench")[2]
    assert "| method | samples |" in specbench  # a task without a score shows none
    reads = needle["methods"]["streaming:budget=0.3"]["kv_read_fraction"]
    assert f"accuracy on needle (streaming:budget=0.3 at {reads:.1%} of the KV reads" in tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["longbench", "--dataset", "squad"], "longbench has no data set 'squad'; known: narrativeqa"),
        (["longbench", "--dataset", "lcc", "--data", "absent"], "cannot read absent"),
        (["longbench2", "--by", "colour"], "colour"),
        (["infinitebench", "--task", "songs"], "infinitebench has no data set 'songs'"),
        (["specbench", "--data", "absent.jsonl"], "absent.jsonl"),
        (["specbench"], "--data"),
    ],
)
def test_refusals(ask, arguments: list[str], message: str) -> None:
    result = ask(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_a_malformed_line_is_named(ask, tmp_path: Path) -> None:
    path = write(tmp_path, "lcc.jsonl", {"context": "", "input": "", "answers": [""]})
    path.write_text(path.read_text() + "{\n", encoding="utf-8")
    result = ask("longbench", "--dataset", "lcc", "--data", tmp_path)
    assert result.exit_code == 2 and "lcc.jsonl, line 2, is not JSON" in result.stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = run("report", tmp_path, "--out", tmp_path / "page.html")
    assert result.exit_code == 2 and str(tmp_path) in result.stderr


@pytest.mark.parametrize("damage", ["samples-dense.jsonl", "summary.json"])
def test_a_damaged_run_is_refused(ask, tmp_path: Path, damage: str) -> None:
    rows = [{"question_id": 1, "category": "qa", "turns": ["Say it."]}]
    document(ask("specbench", "--data", write(tmp_path, "question.jsonl", *rows), "--max-new-tokens", 4))
    folder = tmp_path / "run-specbench"
    (folder / damage).write_text('{"id": 1}\n', encoding="utf-8")
    result = run("report", folder, "--out", tmp_path / "page.html")
    assert result.exit_code == 2 and f"the run {folder} is damaged" in result.stderr
