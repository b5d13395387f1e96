"""Texts to evaluate on, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specattn.errors import UsageError
from specattn.text import first_tokens


@dataclass(frozen=True)
class Document:
    """A named stretch of tokens: the evaluated ones and the one after them."""

    name: str
    tokens: list[int]


def read_text(path: Path | str) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: if the file cannot be read, is empty or is not text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv -t utf-8"
        ) from None
    if not text.strip():
        raise UsageError(f"{path} is empty; give a file with text")
    if "\0" in text:
        raise UsageError(f"{path} holds zero bytes and does not look like text; give a plain text file")
    return text


def load_documents(paths: Sequence[Path | str], tokenizer: Any, count: int) -> list[Document]:
    """The first ``count`` tokens of each file.

    Raises:
        UsageError: if a file is not text or too short.
    """
    documents = []
    for path in paths:
        text = read_text(path)
        tokens = first_tokens(tokenizer, text, count)
        if len(tokens) < count:
            raise UsageError(
                f"{path} has {len(tokens):,} tokens and {count:,} are needed; use a longer text or a shorter context"
            )
        documents.append(Document(Path(path).stem, tokens))
    return documents
