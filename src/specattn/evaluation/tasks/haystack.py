"""Text to hide things in, cut to a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError
from specattn.evaluation.documents import read_text
from specattn.evaluation.tasks.words import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

SLACK = 0.01
"""A prompt may fall short of its length by this share."""

LONGEST = 240
"""Characters of a sentence at most."""


@dataclass(frozen=True)
class Haystack:
    """Sentences that are repeated as often as it takes."""

    sentences: Sequence[str]

    def take(self, count: int, start: int = 0) -> list[str]:
        """``count`` sentences from number ``start`` on."""
        first = start % len(self.sentences)
        return list(islice(cycle(self.sentences), first, first + count))


NOISE = Haystack(
    [
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
    ]
)
"""The filler of Mohtashami and Jaggi (2023), which RULER uses as well."""


def text_haystack(path: str) -> Haystack:
    """The sentences of a text file; without one, of made-up text that repeats nothing for 100,000 tokens.

    Raises:
        UsageError: if the file cannot be read.
    """
    if not path:
        return Haystack(_made_up(Random(0), 6000))
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(read_text(path).split()))
    # A text without full stops, such as code, is cut all the same.
    return Haystack([piece for sentence in sentences for piece in wrap(sentence, LONGEST)])


def _made_up(random: Random, count: int) -> list[str]:
    forms = (
        "The {} {} stood near the {} {}.",
        "Nobody saw the {} {} behind the {} {}.",
        "Beyond a {} {} they found another {} {}.",
        "In winter the {} {} looked like a {} {}.",
        "She gave the {} {} to the keeper of the {} {}.",
    )
    return [
        random.choice(forms).format(
            random.choice(ADJECTIVES), random.choice(NOUNS), random.choice(ADJECTIVES), random.choice(NOUNS)
        )
        for _ in range(count)
    ]


def hide(sentences: Sequence[str], needles: Iterable[tuple[float, str]], separator: str = " ") -> str:
    """The sentences with each needle at its depth: 0 comes before all of them, 1 after."""
    pieces = [(index + 0.5, sentence) for index, sentence in enumerate(sentences)]
    pieces += [(round(depth * len(sentences)), needle) for depth, needle in needles]
    return separator.join(text for _, text in sorted(pieces, key=lambda piece: piece[0]))


def budget(pair: Pair | FoundPair, length: int, new_tokens: int) -> int:
    """Tokens of the prompt in a context of ``length``: the answer and the chat template are part of it.

    Raises:
        UsageError: if nothing is left.
    """
    tokenizer: Any = pair.tokenizer
    template = 0
    if tokenizer.chat_template:
        message = [{"role": "user", "content": ""}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        template = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    left = length - new_tokens - template
    if left < 1:
        raise UsageError(
            f"--length {length} leaves no room for a prompt: {new_tokens} tokens of answer, {template} of template"
        )
    return left


def fit(render: Callable[[int], str], tokenizer: Any, limit: int, *, most: int = 10**7) -> int:
    """The size whose text has at most ``limit`` tokens and nearly as many.

    Args:
        render: the text of a size; a larger size has more tokens.
        most: the largest size that there is.

    Returns:
        The largest size, or one whose text falls short by less than ``SLACK``.

    Raises:
        UsageError: if size 1 is too long.
    """

    def count(size: int) -> int:
        return len(tokenizer(render(size))["input_ids"])

    low, low_tokens, high = 1, count(1), most + 1
    if low_tokens > limit:
        raise UsageError(
            f"the shortest prompt has {low_tokens} tokens and --length leaves {limit}; use a longer --length"
        )
    first, size = low_tokens, min(32, most)
    while limit - low_tokens >= SLACK * limit and high - low > 1:
        tokens = count(size)
        if tokens <= limit:
            low, low_tokens = size, tokens
        else:
            high = size
        # Tokens grow nearly linearly with the size; where they do not, halve what is left.
        each = max((tokens - first) / max(1, size - 1), 1e-3)
        guess = 1 + int((limit - first) / each)
        size = guess if low < guess < high else (low + min(high, 4 * low)) // 2
    return low
