"""LongBench v2 on small files of its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from suite_files import asked, reader, write

from specattn.errors import UsageError
from specattn.evaluation.tasks.longbench2 import LongBench2
from specattn.evaluation.tasks.options import DataFile, Names

ROW = {
    "_id": "66f",
    "domain": "Law",
    "difficulty": "hard",
    "length": "short",
    "question": " Why? ",
    "choice_A": "one",
    "choice_B": "two",
    "choice_C": "three",
    "choice_D": "four",
    "answer": "B",
    "context": " Because. ",
}
LONG = {**ROW, "_id": "77f", "length": "long"}


def data(folder: Path, content: object) -> DataFile:
    (folder / "data.json").write_text(json.dumps(content), encoding="utf-8")
    return DataFile(folder)


def test_samples(tmp_path: Path) -> None:
    short, long = asked(LongBench2(data=data(tmp_path, [ROW, LONG]), by="length"), reader())
    assert [short.id, short.group, list(short.references), short.max_new_tokens] == [
        "66f",
        "short",
        ["B"],
        128,
    ]
    text = str(short.prompt)
    assert "<text>\nBecause.\n</text>" in text and "question: Why?\nChoices:\n(A) one\n(B) two\n" in text
    assert long.group == "long"


def test_jsonl_and_lengths(tmp_path: Path) -> None:
    write(tmp_path, "v2.jsonl", [ROW, LONG])
    task = LongBench2(data=DataFile(tmp_path / "v2.jsonl"), lengths=Names("long"))
    (sample,) = asked(task, reader())
    assert (sample.id, sample.group) == ("77f", "")


def test_the_middle_of_a_long_text_is_dropped(tmp_path: Path) -> None:
    task = LongBench2(data=data(tmp_path, [{**ROW, "context": 5000 * "x"}]))
    (sample,) = asked(task, reader(1000))
    assert len(sample.prompt) == 1000 - 128 - 128 and int(str(sample.metadata["dropped"])) > 4000
    assert str(sample.prompt).endswith('"The correct answer is (insert answer here)".')


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("The correct answer is (B)", 1.0),
        ("**The correct answer is B.**", 1.0),
        ("Not (B). The correct answer is (A), not The correct answer is B", 0.0),
        ("B", 0.0),
        ("", 0.0),
    ],
)
def test_score(tmp_path: Path, output: str, score: float) -> None:
    task = LongBench2(data=data(tmp_path, [ROW]))
    (sample,) = asked(task, reader())
    assert task.score(sample, output) == score


def test_malformed_data(tmp_path: Path) -> None:
    short = {name: value for name, value in ROW.items() if name != "choice_D"}
    for content, message in [
        ({}, "no list"),
        ([ROW, short], "question 2, has no 'choice_D'"),
        ([3], "question 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            list(LongBench2(data=data(tmp_path, content)).samples(reader()))
    (tmp_path / "data.json").write_text("[")
    with pytest.raises(UsageError, match=r"data.json is not JSON"):
        list(LongBench2(data=DataFile(tmp_path)).samples(reader()))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options, message in [
        ({"by": "colour"}, "by"),
        ({"lengths": Names("huge")}, "'huge'"),
        ({"longest": -1}, "longest"),
    ]:
        with pytest.raises(UsageError, match=message):
            LongBench2(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no room for a prompt"):
        list(LongBench2(data=data(tmp_path, [ROW])).samples(reader(200)))
