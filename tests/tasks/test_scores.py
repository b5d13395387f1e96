"""The scores of LongBench, against values worked out by hand."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from specattn.evaluation.tasks import scores


def test_f1_is_of_words_without_articles_and_marks() -> None:
    assert scores.f1("The cat, sat!", "a cat sat") == 1.0
    assert scores.f1("cat dog", "cat") == pytest.approx(2 / 3)
    assert scores.f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert scores.f1("dog", "cat") == scores.f1("", "cat") == scores.f1("the", "a") == 0.0


def test_f1_of_characters() -> None:
    assert scores.f1_characters("北京。", "北京") == 1.0
    assert scores.f1_characters("北 京 市", "北京") == pytest.approx(4 / 5)


def test_classification() -> None:
    classes = ["Date", "Description", "Description of a person", "Animal"]
    assert scores.classification("it is a Date", "Date", classes) == 1.0
    assert scores.classification("Date or Animal", "Date", classes) == 0.5
    assert scores.classification("Animal", "Date", classes) == 0.0
    assert scores.classification("nothing", "Date", classes) == 0.0
    # The shorter class is named only as a part of the right one.
    assert scores.classification("Description of a person", "Description of a person", classes) == 1.0


def test_retrieval_and_count() -> None:
    assert scores.retrieval("Paragraph 7", "Paragraph 7") == 1.0
    assert scores.retrieval("7, no, 8", "段落7") == 0.5
    assert scores.retrieval("none", "Paragraph 7") == 0.0
    assert scores.count("17", "17") == 1.0
    assert scores.count("17 of 20", "17") == 0.5
    assert scores.count("117", "17") == 0.0


def test_edit_similarity_is_of_the_first_line_of_code() -> None:
    assert scores.edit_similarity("\n# comment\nreturn x\nreturn y", "return x") == 1.0
    # Seven of eight characters in common: 2 * 7 / 16, rounded to per cent.
    assert scores.edit_similarity("return x", "return y") == 0.88
    assert scores.edit_similarity("`a`\n// b", "return x") == 0.0
    assert scores.edit_similarity("", "") == 0.0


def test_chinese_words(monkeypatch: pytest.MonkeyPatch) -> None:
    cutter = ModuleType("jieba")
    cutter.cut = lambda text, cut_all: text.split("|")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jieba", cutter)
    assert scores.f1_zh("北京|。|大学", "北京|大学") == 1.0
    assert scores.f1_zh("北京|市", "北京") == pytest.approx(2 / 3)
    assert scores.rouge_zh("北京|市", "北京|大学") == pytest.approx(1 / 2, abs=1e-7)
