"""Data of published benchmarks: where it is looked for, what is refused, and how prompts are cut."""

from __future__ import annotations

import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from suite_files import reader

from specattn.errors import UsageError
from specattn.evaluation.tasks.options import DataFile
from specattn.evaluation.tasks.published import Hub, check_names, cut_middle, find_file, read_rows, room

HUB = Hub("someone/Bench")


def archive(path: Path, content: str = "{}\n") -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("data/a.jsonl", content)
    return path


def test_a_file_a_folder_and_the_folder_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_text("{}")
    assert find_file(DataFile(tmp_path / "a.jsonl"), "x.jsonl", HUB) == tmp_path / "a.jsonl"
    assert find_file(DataFile(tmp_path), "a.jsonl", HUB) == tmp_path / "a.jsonl"
    assert find_file(DataFile(tmp_path), "b.jsonl", HUB) == tmp_path / "data" / "b.jsonl"
    with pytest.raises(UsageError, match=r"no c.jsonl in .*someone/Bench"):
        find_file(DataFile(tmp_path), "c.jsonl", HUB)


def test_a_file_is_read_as_its_own_data_set_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    data = DataFile(tmp_path / "a.jsonl")
    assert read_rows(data, "a.jsonl", HUB, ["x"]) == [{"x": 1}]
    with pytest.raises(UsageError, match=r"a.jsonl is not b.jsonl"):
        read_rows(data, "b.jsonl", HUB, ["x"])


def test_an_archive_is_unpacked_once_and_again_if_it_changed(tmp_path: Path) -> None:
    path = DataFile(archive(tmp_path / "data.zip"))
    found = find_file(path, "a.jsonl", HUB)
    assert found.read_text() == "{}\n"
    before = found.stat().st_mtime_ns
    assert find_file(path, "a.jsonl", HUB).stat().st_mtime_ns == before
    archive(tmp_path / "data.zip", '{"longer": 1}\n')
    assert find_file(path, "a.jsonl", HUB).read_text() == '{"longer": 1}\n'
    with pytest.raises(UsageError, match=r"no b.jsonl in .*data.zip"):
        find_file(path, "b.jsonl", HUB)


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_an_archive_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot unpack .*data.zip"):
        find_file(DataFile(tmp_path / "data.zip"), "a.jsonl", HUB)


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(archive(tmp_path / name)) if name.endswith(".zip") else str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_file(DataFile(), "a.jsonl", HUB) == tmp_path / "a.jsonl"
    assert find_file(DataFile(), "a.jsonl", Hub("someone/Zip", "data.zip")).read_text() == "{}\n"
    assert asked == [("someone/Bench", "a.jsonl", "dataset"), ("someone/Zip", "data.zip", "dataset")]


def test_without_the_hub_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        UsageError, match=r"cannot get a.jsonl of the data set someone/Bench.*no route; .*data=PATH"
    ):
        find_file(DataFile(), "a.jsonl", HUB)


def test_a_long_prompt_loses_its_middle() -> None:
    tokenizer = reader().tokenizer
    assert cut_middle(tokenizer, "abcdef", 6) == ("abcdef", 0)
    assert cut_middle(tokenizer, "abcdefghij", 4) == ("abij", 6)
    assert cut_middle(tokenizer, "abcdefghij", 5) == ("abij", 6)


def test_room_for_a_prompt() -> None:
    assert room(reader(4000), 500) == 4000 - 500 - 128
    assert room(reader(4000), 500, 1000) == 1000
    assert room(reader(4000), 500, 10_000) == 4000 - 500 - 128


def test_unknown_data_sets_are_named() -> None:
    assert check_names("bench", [], ["a", "b"]) == ["a", "b"]
    with pytest.raises(UsageError, match="bench has no data set 'c'; known: a, b"):
        check_names("bench", ["a", "c"], ["a", "b"])
