"""Spec-Bench on a small file of its form, asked of a tiny pair."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite_files import asked, left_out, reader, write
from tiny import tiny_pair

from specattn.errors import UsageError
from specattn.evaluation.tasks.options import DataFile
from specattn.evaluation.tasks.questions import questions
from specattn.evaluation.tasks.registry import get_task
from specattn.evaluation.tasks.run_folder import RunFolder
from specattn.evaluation.tasks.runner import configuration, run_task
from specattn.evaluation.tasks.specbench import SpecBench
from specattn.selection.registry import parse_method

ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write more."]},
    {"question_id": 101, "category": "translation", "turns": ["Translate."]},
]


def test_first_turns_by_category(tmp_path: Path) -> None:
    task = SpecBench(data=write(tmp_path, "question.jsonl", ROWS))
    writing, translation = asked(task, reader())
    assert (writing.id, writing.group, writing.metadata["category"]) == ("81", "mt_bench", "writing")
    assert writing.prompt == "Write."
    assert (translation.group, translation.max_new_tokens) == ("translation", 1024)
    assert task.metric == "" and task.score(writing, "anything") == 0.0


def test_accepted_lengths_and_speed_by_category(tmp_path: Path) -> None:
    pair = tiny_pair("llama")
    data = write(tmp_path, "question.jsonl", ROWS)
    task = get_task("specbench", data=str(data), max_new_tokens="12")
    wanted = questions(pair, task)
    folder = RunFolder.open(tmp_path / "run", configuration(pair, task, wanted, gamma=2))
    summary = run_task(pair, task, wanted, [parse_method("dense")], folder, gamma=2)
    groups = summary["methods"]["dense"]["groups"]
    assert set(groups) == {"mt_bench", "translation"}
    for figures in groups.values():
        assert figures["tokens_per_second"] > 0 and sum(figures["accepted_per_round"]) > 0


def test_what_is_refused_and_left_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"download https://github.com/hemingkx/Spec-Bench"):
        list(SpecBench().samples(reader()))
    data = write(tmp_path, "question.jsonl", [{**ROWS[0], "turns": []}])
    assert left_out(SpecBench(data=data), reader())[0].reason == "it has no turns"
    write(tmp_path, "question.jsonl", [{"question_id": 1}])
    with pytest.raises(UsageError, match=r"question.jsonl, line 1, has no 'category'"):
        list(SpecBench(data=data).samples(reader()))
    with pytest.raises(UsageError, match=r"absent\.jsonl"):
        list(SpecBench(data=DataFile(tmp_path / "absent.jsonl")).samples(reader()))
