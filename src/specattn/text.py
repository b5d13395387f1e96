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
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=1)
        self._backend = tokenizer.backend_tokenizer
        # Tokens that may still take part in a character, how many of them are in the text already, and how much of it.
        self._recent: list[int] = []
        self._known = 0
        self._read = 0
        self._taken: list[str] = []
        # No stop string begins before it: what may be the beginning of one is not taken.
        self._rest = ""

    @property
    def text(self) -> str:
        """What was decoded so far, without a stop string."""
        return "".join([*self._taken, self._rest])

    def push(self, token: int) -> None:
        """Decode one more token; sets ``stopped`` when it completes a stop string.

        Nothing is added to the text while a character is unfinished. The tokens before it are decoded again, as what a
        token reads may depend on them (a space, a run of bytes).
        """
        self._recent.append(token)
        whole = self._decoded()
        if len(whole) <= self._read or whole.endswith(REPLACEMENT):
            return
        self._rest += whole[self._read :]
        if self._stop:
            self._cut(len(whole) - self._read)
        del self._recent[: self._known]
        self._known, self._read = len(self._recent), len(self._decoded())

    def take(self, *, final: bool = False) -> str:
        """Text that was not taken yet, less a tail that may turn out to begin a stop string unless ``final``."""
        certain = final or self.stopped or not self._stop
        end = len(self._rest) if certain else len(self._rest) - self._held_back()
        piece, self._rest = self._rest[:end], self._rest[end:]
        self._taken.append(piece)
        return piece

    def _cut(self, new: int) -> None:
        """Look for a stop string that ends in the last ``new`` characters."""
        since = max(0, len(self._rest) - new - self._longest + 1)
        found = [at for stop in self._stop if (at := self._rest.find(stop, since)) >= 0]
        if found:
            self._rest = self._rest[: min(found)]
            self.stopped = True

    def _decoded(self) -> str:
        text: str = self._backend.decode(self._recent, skip_special_tokens=True)
        return text

    def _held_back(self) -> int:
        for count in range(min(self._longest - 1, len(self._rest)), 0, -1):
            if any(stop.startswith(self._rest[-count:]) for stop in self._stop if len(stop) > count):
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
