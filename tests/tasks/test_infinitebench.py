"""InfiniteBench on small files of its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_files import asked, left_out, reader, write

from specattn.errors import UsageError
from specattn.evaluation.tasks import infinitebench_scores as scores
from specattn.evaluation.tasks.infinitebench import InfiniteBench
from specattn.evaluation.tasks.options import Names
from specattn.evaluation.tasks.published import prompts

OPTIONS = ["one", "two", "three", "four"]
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "passkey": ({"answer": ["71432"]}, "quiz?\n\nThe pass key is", " 71432."),
    "number_string": ({"answer": "900"}, "The sequence of digits is", "900"),
    "kv_retrieval": ({"answer": "a-b"}, "object below.\n\ntext\n\nquiz?", '"key": "a-b"'),
    "longbook_sum_eng": ({"answer": ["A short book."]}, "text\n\nSummary:", "a short book"),
    "longbook_choice_eng": ({"answer": ["two"], "options": OPTIONS}, "B. two\nC. three", " B"),
    "longbook_qa_eng": ({"answer": ["Ann Lee", "Ann"]}, "Question: quiz?\nAnswer:", "Ann"),
    "longbook_qa_chn": ({"answer": ["北京"]}, "", "北京。"),
    "longdialogue_qa_eng": ({"answer": ["ANN"]}, "with $$MASK$$ is likely", "Ann: hello"),
    "math_find": (
        {"answer": [17], "input": "The largest number of the list is:"},
        "What is the largest number in the following list?\n\ntext",
        " 17",
    ),
    "math_calc": ({"answer": [1, 4, 8]}, "Expression: text\nValues:", "[1, 4, 8]"),
    "code_run": (
        {"answer": [-7], "input": "What is func_12(-3)?"},
        "called func_12 in the following Python code.\n\ntext\n\nPlease compute the exact value of func_12(-3).",
        "is -7",
    ),
    "code_debug": ({"answer": ["two", "B"], "options": OPTIONS}, "The correct option is:", " B. two"),
}


@pytest.mark.parametrize("name", ROWS)
def test_prompt_and_score_of_every_task(tmp_path: Path, name: str) -> None:
    changes, part, output = ROWS[name]
    row = {"id": 0, "context": "text", "input": "quiz?", "options": [], **changes}
    task = InfiniteBench(data=write(tmp_path, f"{name}.jsonl", [row]), tasks=Names(name))
    (sample,) = asked(task, reader(40_000))
    published = prompts("infinitebench")["datasets"][name]
    assert (sample.group, sample.max_new_tokens) == (name, published["max_new_tokens"])
    assert part in str(sample.prompt)
    assert task.score(sample, output) == 1.0
    assert task.score(sample, "wrong") < 0.5


def test_there_are_twelve() -> None:
    assert set(ROWS) == set(prompts("infinitebench")["datasets"]) and len(ROWS) == 12


def test_a_long_context_loses_its_middle_and_no_room_is_said(tmp_path: Path) -> None:
    row = {"context": "y" * 3000, "input": "quiz?", "answer": ["1"], "options": []}
    task = InfiniteBench(data=write(tmp_path, "passkey.jsonl", [row]), tasks=Names("passkey"))
    (sample,) = asked(task, reader(1000))
    assert len(sample.prompt) == 1000 - 6 - 128 and str(sample.prompt).endswith("The pass key is")
    write(tmp_path, "math_calc.jsonl", [row])
    (item,) = left_out(InfiniteBench(data=task.data, tasks=Names("math_calc")), reader(1000))
    assert "30,000 tokens" in item.reason


def test_rows_of_another_form_are_left_out(tmp_path: Path) -> None:
    good = {"context": "x", "input": "quiz?", "answer": ["two"], "options": OPTIONS}
    rows = [good, {**good, "answer": ["five"]}, {**good, "options": ["one"]}, {**good, "answer": []}]
    task = InfiniteBench(
        data=write(tmp_path, "longbook_choice_eng.jsonl", rows), tasks=Names("longbook_choice_eng")
    )
    assert [item.id[-1] for item in left_out(task, reader())] == ["1", "2", "3"]


def test_malformed_data_is_named_by_its_line(tmp_path: Path) -> None:
    data = write(tmp_path, "passkey.jsonl", [{"context": "x", "input": "y", "answer": "z"}])
    with pytest.raises(UsageError, match=r"passkey.jsonl, line 1, has no 'options'"):
        list(InfiniteBench(data=data, tasks=Names("passkey")).samples(reader()))
    with pytest.raises(UsageError, match="infinitebench has no data set 'songs'"):
        InfiniteBench(tasks=Names("songs"))


@pytest.mark.parametrize(
    ("metric", "output", "answers", "expected"),
    [
        (scores.first_number, "it is 12 or 13", ["12"], 1),
        (scores.first_number, "it is 123", ["12"], 0),
        (scores.word, "ab, a-b", ["a-b"], 1),
        (scores.word, "xa-b", ["a-b"], 0),
        (scores.number, "2.5", ["2.5"], 1),
        (scores.number, "17.0", ["17"], 0),
        (scores.number, "none", ["17"], 0),
        (scores.numbers, "1, 4, 9", ["[1, 4, 8]"], 2 / 3),
        (scores.numbers, "1", ["[1, 4, 8]"], 1 / 3),
        (scores.last_number, "the value is `4`.", ["4"], 1),
        (scores.last_number, "4 it is", ["4"], 0),
        (scores.last_number, "", ["4"], 0),
        (scores.choice, "two", ["two", "B"], 1),
        (scores.choice, 'the "answer is" B', ["two", "B"], 1),
        (scores.choice, "the answer is: C", ["two", "B"], 0),
        (scores.choice, "maybe B or C", ["two", "B"], 1),
        (scores.choice, "", ["two", "B"], 0),
        (scores.debug, "B: because", ["f", "B"], 1),
        (scores.debug, "The answer is: **f**", ["f", "B"], 1),
        (scores.debug, "the answer is:", ["f", "B"], 0),
        (scores.debug, "B", ["f", "B"], 0),
    ],
)
def test_scores(metric: Any, output: str, answers: list[str], expected: float) -> None:
    assert metric(output, answers) == pytest.approx(expected)
