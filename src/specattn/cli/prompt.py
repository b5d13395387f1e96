"""The prompt: an argument, a file, standard input, or a question about a document."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from specattn.errors import UsageError

if TYPE_CHECKING:
    from specattn.pairs import FoundPair


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text to continue: the file's, then a blank line, then ``prompt``; ``-`` is standard input.

    Raises:
        UsageError: if there is no prompt, or it is empty or not text.
    """
    parts = []
    if file is not None:
        parts.append(_read(file).rstrip("\n"))
    if prompt is not None:
        parts.append(_check(prompt.encode("utf-8", "surrogateescape"), "the prompt"))
    if not parts:
        raise UsageError("there is no prompt; give PROMPT, or --prompt-file FILE (- for standard input)")
    return "\n\n".join(parts)


def encode(pair: FoundPair, text: str, *, chat: bool) -> list[int]:
    """Token ids of the prompt; with ``chat`` as a user's message in the tokenizer's chat template.

    Raises:
        UsageError: if the tokenizer has no chat template.
    """
    tokenizer = pair.tokenizer
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of {pair.name} has no chat template; leave --chat out")
    message = [{"role": "user", "content": text}]
    templated = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(templated, add_special_tokens=False)["input_ids"])


def _read(file: Path) -> str:
    from specattn.evaluation.documents import read_text

    return _check(sys.stdin.buffer.read(), "standard input") if str(file) == "-" else read_text(file)


def _check(data: bytes, source: str) -> str:
    """Text that did not come from a file, under the rules of :func:`read_text`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text (byte {error.start}); convert it") from None
    if not text.strip():
        raise UsageError(f"{source} is empty; give some text")
    if "\0" in text:
        raise UsageError(f"{source} holds zero bytes and does not look like text; give plain text")
    return text
