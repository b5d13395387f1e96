"""Fixtures of the pairs tests: an empty cache folder, packages that carry parts, tiny models in folders."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specattn.pairs.builtin import BuiltinModel, Part


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder: empty, and not the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECATTN_CACHE", str(folder))
    return folder


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Saves a model and a tokenizer to a folder, and returns its path."""

    def save(
        name: str, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> str:
        folder = tmp_path / name
        (model or tiny_model("llama")).save_pretrained(folder)
        (tokenizer or tiny_tokenizer()).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BuiltinModel]:
    """Installs some bytes as packages, one for each part; importing any of them is an error."""

    def package(*parts: bytes, name: str = "fake-model") -> BuiltinModel:
        entries = []
        for i, content in enumerate(parts, start=1):
            entries.append(Part(f"{name}-part{i}", "1.0", f"data/{i}.bin", f"{zlib.crc32(content):08x}"))
            module = tmp_path / "packages" / entries[-1].module
            (module / "data").mkdir(parents=True)
            (module / "__init__.py").write_text("raise RuntimeError('data only: not to be imported')\n")
            (module / entries[-1].file).write_bytes(content)
        whole = b"".join(parts)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        digest = hashlib.sha256(whole).hexdigest()
        return BuiltinModel(name, f"pip install {name}", len(whole), digest, tuple(entries))

    return package
