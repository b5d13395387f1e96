"""HumanEval and GSM8K on small files of the same shape."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specattn.errors import UsageError
from specattn.evaluation.tasks.data import load_rows
from specattn.evaluation.tasks.gsm8k import EXAMPLES, GSM8K, final_number
from specattn.evaluation.tasks.humaneval import HumanEval
from specattn.evaluation.tasks.options import DataFile

PAIR = SimpleNamespace(name="none")
DOUBLE = {
    "task_id": "Test/0",
    "prompt": 'import math\n\n\ndef twice(x: float) -> float:\n    """Twice x.\n    >>> twice(2)\n    4\n    """\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(math.pi) == 2 * math.pi\n",
}
PROBLEM = {"question": "What are 3 boxes of 400?", "answer": "3 * 400 = <<3*400=1200>>1200.\n#### 1,200"}


def write(path: Path, *rows: dict[str, Any]) -> DataFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataFile(path)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("    return 2 * x\n", 1),
        ("    return x + x", 1),
        ("    return 4\n", 0),
        ("    return 2 *", 0),
        ("    while True: pass\n", 0),
        ("    raise SystemExit(0)\n", 0),
        ("", 0),
    ],
)
def test_a_body_is_run_with_its_tests(tmp_path: Path, output: str, score: float) -> None:
    task = HumanEval(write(tmp_path / "data.jsonl", DOUBLE), seconds=1)
    (sample,) = task.samples(PAIR)
    assert sample.id == "Test/0" and sample.prompt == DOUBLE["prompt"]
    assert task.score(sample, output) == score


def test_a_chat_answers_with_the_whole_function(tmp_path: Path) -> None:
    task = HumanEval(write(tmp_path / "data.jsonl", DOUBLE), instruct=True)
    (sample,) = task.samples(PAIR)
    ((message,), prefix) = sample.prompt, sample.answer_prefix
    assert message["role"] == "user" and DOUBLE["prompt"].strip() in message["content"]
    assert prefix.startswith("```python") and any("```" in stop for stop in sample.stop)
    # What the tests import comes from before the declaration.
    assert task.score(sample, "def twice(x):\n    return helper(x)\n\ndef helper(x):\n    return 2 * x") == 1
    assert task.score(sample, "def thrice(x):\n    return 2 * x") == 0


def test_a_body_stops_before_the_next_definition(tmp_path: Path) -> None:
    (sample,) = HumanEval(write(tmp_path / "data.jsonl", DOUBLE)).samples(PAIR)
    for following in ("\ndef other():", "\nclass A:", "\nprint(twice(2))", "\n# Next", "\nif __name__"):
        assert any(following.startswith(stop) for stop in sample.stop)
    assert not any(stop in DOUBLE["canonical_solution"] for stop in sample.stop)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (" 3 * 400 = 1200.\n#### 1200", 1),
        (" So #### $1,200.00 in all, of 7.", 1),
        (" That makes 1,200 pieces.", 1),
        (" That makes 1200.", 1),
        (" 1200 - 1 = 1199", 0),
        ("#### 1200 boxes, or 3", 1),
        ("#### -1200", 0),
        ("#### none", 0),
        (" many", 0),
        ("", 0),
    ],
)
def test_the_final_number_counts(tmp_path: Path, output: str, score: float) -> None:
    task = GSM8K(write(tmp_path / "data.jsonl", PROBLEM))
    (sample,) = task.samples(PAIR)
    assert sample.prompt.endswith(f"Question: {PROBLEM['question']}\n") and sample.answer_prefix == "Answer:"
    assert task.score(sample, output) == score


def test_the_worked_examples_are_right() -> None:
    for example in EXAMPLES.strip().split("\n\n"):
        steps = re.findall(r"(\d[\d+*/ -]*\d) = (\d+)", example)
        assert steps and all(eval(left) == int(right) for left, right in steps)
        assert final_number(example) == int(steps[-1][1])


def test_lines_that_are_not_data_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for text, message in [
        ('{"question": 1}\n', "line 1, has no 'answer'"),
        (json.dumps(PROBLEM) + "\n\n[1]\n", "line 3, has no 'question'"),
        (json.dumps(PROBLEM) + "\n{\n", "line 2, is not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            list(GSM8K(DataFile(path)).samples(PAIR))
    with pytest.raises(UsageError, match="no data was given"):
        list(GSM8K().samples(PAIR))
    with pytest.raises(UsageError, match="cannot read"):
        list(GSM8K(DataFile(tmp_path / "none.jsonl")).samples(PAIR))


def test_separators_within_a_line_end_no_line(tmp_path: Path) -> None:
    row = {"question": "a\u2028b\x85c", "answer": "#### 1"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(str(path), "question") == [row]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        return [PROBLEM]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (sample,) = GSM8K(DataFile("openai/gsm8k")).samples(PAIR)
    assert asked == [("openai/gsm8k", "main", "test")] and sample.references == [PROBLEM["answer"]]
    with pytest.raises(UsageError, match="has no column 'task_id'; its columns: question, answer"):
        list(HumanEval(DataFile("openai/gsm8k")).samples(PAIR))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        list(GSM8K(DataFile("openai/gsm8k")).samples(PAIR))
