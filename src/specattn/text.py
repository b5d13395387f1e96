"""Between text and tokens: a text's first tokens; text as tokens come, with stop strings that may span rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specattn.errors import UsageError

REPLACEMENT = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""

MARGIN = 16
"""Tokens before the end of a cut text that the cut may have changed."""


class TextStream:
    """Text of one request, token by token.

    Args:
        tokenizer: a fast transformers tokenizer.
        stop: strings at which the text ends; they are not part of it.

    Attributes:
        text: what was decoded so far, without a stop string.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._stop = tuple(stop)
        self._backend = tokenizer.backend_tokenizer
        # Tokens that may still take part in a character, and how many of them are in the text already.
        self._recent: list[int] = []
        self._known = 0
        self._emitted = 0

    def push(self, token: int) -> None:
        """Decode one more token; sets ``stopped`` when it completes a stop string."""
        piece = self._decode(token)
        if not piece:
            return
        longest = max((len(stop) for stop in self._stop), default=0)
        since = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, since)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def take(self, *, final: bool = False) -> str:
        """Text that was not taken yet, less a tail that may turn out to begin a stop string unless ``final``."""
        end = len(self.text) if final or self.stopped else len(self.text) - self._held_back()
        piece = self.text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece

    def _decode(self, token: int) -> str:
        """What ``token`` adds to the text: nothing while a character is unfinished.

        The tokens before it are decoded again, as what a token reads may depend on them (a space, a run of bytes).
        """
        self._recent.append(token)
        known = self._backend.decode(self._recent[: self._known], skip_special_tokens=True)
        whole = self._backend.decode(self._recent, skip_special_tokens=True)
        if whole.endswith(REPLACEMENT) or len(whole) <= len(known):
            return ""
        self._recent = self._recent[self._known :]
        self._known = len(self._recent)
        return whole[len(known) :]

    def _held_back(self) -> int:
        longest = max((len(stop) for stop in self._stop), default=1)
        for count in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-count:]) for stop in self._stop if len(stop) > count):
                return count
        return 0


def first_tokens(tokenizer: Any, text: str | Sequence[int], count: int) -> list[int]:
    """The first ``count`` tokens of a text, or all if there are fewer; token ids pass through."""
    if not isinstance(text, str):
        return [int(token) for token in text][:count]
    # A token is at most a few characters: there is no need to encode a whole book for its beginning.
    tokens = list(tokenizer(text[: 16 * (count + MARGIN)])["input_ids"])
    if len(tokens) < count + MARGIN:
        tokens = list(tokenizer(text)["input_ids"])
    return tokens[:count]


def required_tokens(tokenizer: Any, number: int, text: str | Sequence[int], count: int) -> list[int]:
    """The first ``count`` tokens of text ``number`` of several.

    Raises:
        UsageError: if there are fewer.
    """
    tokens = first_tokens(tokenizer, text, count)
    if len(tokens) < count:
        raise UsageError(
            f"text {number + 1} has {len(tokens):,} tokens and {count:,} are to be read; "
            "use a longer text or fewer tokens"
        )
    return tokens
