"""RULER's aggregation: the words of a list that come most often, and those of a text in a made-up code."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase
from typing import Any

from specattn.evaluation.tasks.ruler.parts import Puzzle, fitted
from specattn.evaluation.tasks.words import KEYS, keys

COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
"""Common words, how often each of them comes, and how often each of the others does."""

EXAMPLE_RARE, EXAMPLE_COMMON_TIMES, EXAMPLE_RARE_TIMES = 10, 5, 1

LIST = """\
Below is a numbered list of words. Some words come often, the others seldom. Remember those that come most often.

{text}

What are the {count} words that come most often in the list?
"""
LIST_PREFIX = "The {count} words that come most often in the list are:"

ALPHA = 2.0
"""The exponent of the frequencies: the word of rank k comes in proportion to k to the power of -ALPHA."""

CODED_WORDS, ASKED, NOISE_WORD = 200, 3, "..."

CODED = """\
Read the following coded text. Its words make no sense; count how often each of them comes. The dots are no word.

{text}

What are the {count} words that come most often in the coded text above?
"""
CODED_PREFIX = "The {count} words that come most often in the coded text above are:"


def common_words(random: Random, tokenizer: Any, limit: int) -> Puzzle:
    """Ten words that come 30 times among words that come three times, after a short example."""
    words = keys(random, KEYS)
    shown, rest = words[: COMMON + EXAMPLE_RARE], words[COMMON + EXAMPLE_RARE :]
    example = _list(random, shown[:COMMON], shown[COMMON:], EXAMPLE_COMMON_TIMES, EXAMPLE_RARE_TIMES)
    prefix = LIST_PREFIX.format(count=COMMON)
    example += prefix + " " + ", ".join(shown[:COMMON]) + "\n\n"
    common, rare = rest[:COMMON], rest[COMMON:]
    seed = random.getrandbits(64)
    return fitted(
        # The order depends on the size alone, so that a size has one text.
        lambda count: example + _list(Random(seed), common, rare[:count], COMMON_TIMES, RARE_TIMES),
        prefix,
        common,
        tokenizer,
        limit,
        most=len(rare),
    )


def _list(random: Random, common: list[str], rare: list[str], often: int, seldom: int) -> str:
    words = common * often + rare * seldom
    random.shuffle(words)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return LIST.format(text=text, count=len(common))


def frequent_words(random: Random, tokenizer: Any, limit: int) -> Puzzle:
    """Coded words with frequencies of a power law; dots are the most frequent, the next three are asked for."""
    words: list[str] = []
    while len(words) < CODED_WORDS:
        word = "".join(random.choices(ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    seed = random.getrandbits(64)
    return fitted(
        lambda count: _coded(Random(seed), [NOISE_WORD, *words], count),
        CODED_PREFIX.format(count=ASKED),
        words[:ASKED],
        tokenizer,
        limit,
    )


def _coded(random: Random, words: list[str], count: int) -> str:
    """A text in which the asked words come in steps of their own, however short it is."""
    counts = [int(10 * (count + ASKED) * rank**-ALPHA) for rank in range(1, len(words) + 1)]
    text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
    random.shuffle(text)
    return CODED.format(text=" ".join(text), count=ASKED)
