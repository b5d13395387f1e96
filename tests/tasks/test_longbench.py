"""LongBench on small files of its form."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from suite_files import asked, left_out, reader, write

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import Sample
from specattn.evaluation.tasks.longbench import LongBench
from specattn.evaluation.tasks.options import Names
from specattn.evaluation.tasks.published import prompts
from specattn.evaluation.tasks.registry import get_task

ROW = {
    "input": "Who?",
    "context": "Somebody.",
    "answers": ["Ann", "Ann Lee"],
    "length": 2,
    "all_classes": None,
    "_id": "x",
}
DATASETS = prompts("longbench")["datasets"]


def test_all_data_sets_have_a_prompt_a_length_and_a_score() -> None:
    assert len(DATASETS) == 21
    for name, published in DATASETS.items():
        assert "{context}" in published["prompt"], name
        assert published["max_new_tokens"] in (32, 64, 128, 512), name
        answer = "Paragraph 7" if published["metric"] == "retrieval" else "7"
        sample = Sample("x", "", [answer], 1, name, metadata={"classes": ["7", "8"]})
        if not published["metric"].endswith("_zh"):
            assert LongBench().score(sample, answer) == pytest.approx(1.0), name
            assert LongBench().score(sample, "nothing of it") < 0.4, name


def test_samples(tmp_path: Path) -> None:
    data = write(tmp_path, "hotpotqa.jsonl", [ROW, ROW])
    write(tmp_path, "lcc.jsonl", [ROW])
    task = LongBench(data=data, datasets=Names("hotpotqa,lcc"))
    first, second, code = asked(task, reader())
    assert [first.id, second.id, code.id] == ["hotpotqa-0", "hotpotqa-1", "lcc-0"]
    assert (first.group, first.max_new_tokens, list(first.references)) == ("hotpotqa", 32, ["Ann", "Ann Lee"])
    assert isinstance(first.prompt, str)
    assert first.prompt.endswith("Question: Who?\nAnswer:") and "passages.\nSomebody.\n" in first.prompt
    assert code.prompt == "Please complete the code given below. \nSomebody.Next line of code:\n"


def test_few_shot_and_code_stay_without_a_chat_template(tmp_path: Path) -> None:
    data = write(tmp_path, "qasper.jsonl", [ROW])
    write(tmp_path, "triviaqa.jsonl", [ROW])
    names = Names("qasper,triviaqa")
    chat, plain = asked(LongBench(data=data, datasets=names, chat=True), reader())
    assert not isinstance(chat.prompt, str) and chat.prompt[0]["role"] == "user"
    assert isinstance(plain.prompt, str)
    off = asked(LongBench(data=data, datasets=names), reader())
    assert all(isinstance(sample.prompt, str) for sample in off)


def test_a_long_prompt_loses_its_middle(tmp_path: Path) -> None:
    data = write(tmp_path, "lcc.jsonl", [{**ROW, "context": "begin" + 5000 * "x" + "end\n"}])
    (sample,) = asked(LongBench(data=data, datasets=Names("lcc")), reader(1000))
    assert isinstance(sample.prompt, str)
    assert len(sample.prompt) == 1000 - 64 - 128
    assert sample.prompt.startswith("Please complete") and sample.prompt.endswith("end\nNext line of code:\n")
    whole = DATASETS["lcc"]["prompt"].format(context="begin" + 5000 * "x" + "end\n")
    assert sample.metadata["dropped"] == len(whole) - len(sample.prompt)
    (shorter,) = asked(LongBench(data=data, datasets=Names("lcc"), longest=100), reader(1000))
    assert len(shorter.prompt) == 100


def test_the_nearest_answer_and_the_first_line_count() -> None:
    task = LongBench()
    words = Sample("x", "", ["Ann", "Ann Lee"], 32, "triviaqa")
    assert task.score(words, "\nAnn Lee\nQuestion: and so on") == 1.0
    assert task.score(Sample("x", "", ["Ann"], 32, "hotpotqa"), "Ann\nLee") == pytest.approx(2 / 3)
    label = Sample("x", "", ["Date"], 64, "trec", metadata={"classes": ["Date", "City"]})
    assert task.score(label, "Date\nCity") == 1.0


def test_chinese_is_left_out_without_jieba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path, "dureader.jsonl", [ROW])
    task = LongBench(data=data, datasets=Names("dureader"))
    monkeypatch.setitem(sys.modules, "jieba", None)
    (item,) = left_out(task, reader())
    assert "pip install jieba" in item.reason and item.group == "dureader"
    cutter = ModuleType("jieba")
    cutter.__spec__ = __spec__
    monkeypatch.setitem(sys.modules, "jieba", cutter)
    assert len(asked(task, reader())) == 1


def test_what_cannot_be_asked_is_left_out(tmp_path: Path) -> None:
    data = write(tmp_path, "lcc.jsonl", [{**ROW, "answers": []}])
    task = LongBench(data=data, datasets=Names("lcc"))
    assert left_out(task, reader())[0].reason == "it has no answer"
    write(tmp_path, "lcc.jsonl", [ROW])
    assert "no room beside an answer of 64" in left_out(task, reader(150))[0].reason


def test_malformed_data_is_named_by_its_line(tmp_path: Path) -> None:
    data = write(tmp_path, "lcc.jsonl", [ROW, {"context": "x", "input": "y"}])
    with pytest.raises(UsageError, match=r"lcc.jsonl, line 2, has no 'answers'"):
        list(LongBench(data=data, datasets=Names("lcc")).samples(reader()))
    write(tmp_path, "trec.jsonl", [{key: value for key, value in ROW.items() if key != "all_classes"}])
    with pytest.raises(UsageError, match=r"trec.jsonl, line 1, has no 'all_classes'"):
        list(LongBench(data=data, datasets=Names("trec")).samples(reader()))


def test_options_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="longbench has no data set 'squad'"):
        get_task("longbench", datasets="qasper,squad")
    with pytest.raises(UsageError, match="longest"):
        get_task("longbench", longest="-1")
