"""The folder of converted models: made once, found again, and never half there."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from specattn.errors import SpecAttnError, UsageError
from specattn.pairs import conversions
from specattn.pairs.builtin import Part
from specattn.pairs.conversions import cache_dir, convert_builtin, convert_file, require_builtin


class Converter:
    """Stands in for the conversion proper: copies the file, counts, and may fail after the first half."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails: BaseException | None = None

    def __call__(self, file: Path, folder: Path, dtype: torch.dtype) -> None:
        self.calls += 1
        (folder / "config.json").write_text(str(dtype))
        if self.fails is not None:
            raise self.fails
        (folder / "model.safetensors").write_bytes(file.read_bytes())


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    fake = Converter()
    monkeypatch.setattr(conversions.gguf, "convert_gguf", fake)
    return fake


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_converted_once_whatever_its_name(converter, cache, tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    folder = convert_file(first, torch.bfloat16)
    assert convert_file(second, torch.bfloat16) == folder
    assert converter.calls == 1
    assert folder.parent == cache / "models"
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_content_and_dtype_each_have_their_own_conversion(converter, tmp_path):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"weights")
    folders = {convert_file(file, torch.bfloat16), convert_file(file, torch.float32)}
    file.write_bytes(b"other weights")
    folders.add(convert_file(file, torch.bfloat16))
    assert len(folders) == converter.calls == 3


def test_a_converted_builtin_model_needs_its_packages_no_more(converter, packaged):
    model = packaged(b"GG", b"UF")
    folder = convert_builtin(model, torch.bfloat16)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF"
    uninstalled = dataclasses.replace(model, parts=(Part("not-there", "1.0", "data/1.bin", "00000000"),))
    require_builtin(uninstalled, torch.bfloat16)
    assert convert_builtin(uninstalled, torch.bfloat16) == folder
    assert converter.calls == 1


def test_the_assembled_file_is_not_kept(converter, cache, packaged):
    folder = convert_builtin(packaged(b"GG", b"UF"), torch.bfloat16)
    assert names(cache / "models") == [folder.name]
    assert names(folder) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), UsageError("not this one")])
def test_an_interrupted_conversion_leaves_nothing(converter, cache, packaged, interruption):
    model = packaged(b"GG", b"UF")
    converter.fails = interruption
    with pytest.raises(type(interruption)):
        convert_builtin(model, torch.bfloat16)
    assert names(cache / "models") == []
    converter.fails = None
    assert names(convert_builtin(model, torch.bfloat16)) == ["config.json", "model.safetensors"]


def test_what_a_killed_conversion_left_is_not_taken_for_finished(converter, packaged):
    model = packaged(b"GG", b"UF")
    folder = conversions.conversion_path(model.sha256, torch.bfloat16)
    left = folder.with_name(f"{folder.name}.partial") / "converted"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert names(convert_builtin(model, torch.bfloat16)) == ["config.json", "model.safetensors"]
    assert not left.exists()


def test_of_two_at_once_one_converts_and_the_other_waits(converter, packaged, monkeypatch):
    model = packaged(b"GG", b"UF")

    def slow(*arguments: object) -> None:
        time.sleep(0.3)
        converter(*arguments)

    monkeypatch.setattr(conversions.gguf, "convert_gguf", slow)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(convert_builtin(model, torch.bfloat16)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2 and len(set(folders)) == 1
    assert converter.calls == 1


def test_a_full_disk_is_reported_with_the_remedy(converter, cache, packaged):
    converter.fails = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SpecAttnError, match=r"No space left on device.*SPECATTN_CACHE"):
        convert_builtin(packaged(b"GGUF"), torch.bfloat16)
    assert names(cache / "models") == []


def test_a_cache_that_cannot_be_made_is_reported(converter, packaged, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(SpecAttnError, match="SPECATTN_CACHE"):
        convert_builtin(packaged(b"GGUF"), torch.bfloat16)
    assert converter.calls == 0


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECATTN_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPECATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "specattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "specattn"
