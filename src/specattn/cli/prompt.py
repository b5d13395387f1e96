"""The prompt: an argument, a file, standard input, or a question about a document."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError
from specattn.text import first_tokens

if TYPE_CHECKING:
    from specattn.pairs import FoundPair


@dataclass(frozen=True)
class Prompt:
    """A document, a question, or both: the document comes first, then a blank line."""

    document: str | None
    question: str | None

    def cut(self, tokenizer: Any, tokens: int | None) -> Prompt:
        """The same with the first ``tokens`` tokens of the document.

        Raises:
            UsageError: if there is no document.
        """
        if tokens is None:
            return self
        if self.document is None:
            raise UsageError(f"--prompt-tokens {tokens} cuts a file; give one with --prompt-file")
        document = tokenizer.decode(first_tokens(tokenizer, self.document, tokens), skip_special_tokens=True)
        return Prompt(document, self.question)

    @property
    def text(self) -> str:
        """All of it."""
        return "\n\n".join(part for part in (self.document, self.question) if part is not None)


def read_prompt(prompt: str | None, file: Path | None) -> Prompt:
    """What to continue: a file (``-`` is standard input), an argument, or both.

    Raises:
        UsageError: if there is no prompt, or it is empty or not text.
    """
    if prompt is None and file is None:
        raise UsageError("there is no prompt; give PROMPT, or --prompt-file FILE (- for standard input)")
    document = None if file is None else _read(file).rstrip("\n")
    question = None if prompt is None else _check(prompt.encode("utf-8", "surrogateescape"), "the prompt")
    return Prompt(document, question)


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
