"""Files to evaluate on: what becomes of them, and which are refused by name."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from specattn.errors import UsageError
from specattn.evaluation.documents import Document, load_documents, read_text


def test_a_text_is_read_as_utf8(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("naïve 日本語\r\nnext".encode())
    assert read_text(path) == read_text(str(path)) == "naïve 日本語\nnext"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"book\.txt is empty"),
        (b" \n\t", r"book\.txt is empty"),
        (b"caf\xe9", r"book\.txt is not UTF-8 text \(byte 3\); convert it, .*iconv"),
        (b"ELF\0\0\1", r"book\.txt holds zero bytes"),
        (b"\xff\xfea\0", r"book\.txt is not UTF-8"),
    ],
)
def test_what_is_not_text_is_refused(content, message, tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(path)
    with pytest.raises(UsageError, match=message):
        load_documents([path], tiny_tokenizer(), 1)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.txt: No such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_text(tmp_path)


def test_documents_are_the_first_tokens_of_each_file(tmp_path):
    tokenizer = tiny_tokenizer()
    paths = [tmp_path / "b.code.txt", tmp_path / "a.md"]
    for path, text in zip(paths, ["def f(x): return x", "A long, long text."], strict=True):
        path.write_text(text)
    documents = load_documents([paths[0], str(paths[1])], tokenizer, 8)
    assert documents == [
        Document("b.code", tokenizer("def f(x)")["input_ids"]),
        Document("a", tokenizer("A long, ")["input_ids"]),
    ]


def test_a_file_of_too_few_tokens_is_refused(tmp_path):
    path = tmp_path / "brief.txt"
    path.write_text("x" * 1000)
    assert len(load_documents([path], tiny_tokenizer(), 1000)[0].tokens) == 1000
    with pytest.raises(
        UsageError, match=r"brief\.txt has 1,000 tokens and 1,001 are needed; use a longer text"
    ):
        load_documents([path], tiny_tokenizer(), 1001)
