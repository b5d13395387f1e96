"""ROUGE-L against values worked out by hand, and its subsequences against all subsequences."""

from __future__ import annotations

import itertools
import random

import pytest

from specattn.evaluation.tasks.rouge import _common, _places, rouge_l, rouge_l_sum


def f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("the cat sat", "the cat ran away", f(2 / 3, 2 / 4)),
        # Each word counts once, in the texts and in what they share.
        ("a a a b", "a b", 1.0),
        ("b a", "a b", f(1 / 2, 1 / 2)),
        # The union over sentences, the example of Lin (2004): four of five words.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", f(4 / 8, 4 / 5)),
        # Sentences of the reference share one set.
        ("one two", "one. one two.", 1.0),
        ("", "something", 0.0),
        ("...", "something", 0.0),
        ("The", "the", 0.0),
    ],
)
def test_each_word_once(output: str, reference: str, expected: float) -> None:
    assert rouge_l(output, reference) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("The cat sat!", "the cat ran away", f(2 / 3, 2 / 4)),
        ("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", f(4 / 10, 4 / 5)),
        # A word of the output is used up by the line that matched it first.
        ("a", "a\na", f(1 / 1, 1 / 2)),
        ("a b", "a. b", 1.0),
        ("", "a", 0.0),
        ("?!", "a", 0.0),
    ],
)
def test_lines(output: str, reference: str, expected: float) -> None:
    assert rouge_l_sum(output, reference) == pytest.approx(expected)


def subsequences(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(chosen) for size in range(len(words) + 1) for chosen in itertools.combinations(words, size)}


def test_common_subsequences_are_longest() -> None:
    draw = random.Random(0)
    for _ in range(60):
        one, other = (draw.choices("abc", k=draw.randrange(7)) for _ in range(2))
        shared = subsequences(one) & subsequences(other)
        found = _common(one, other)[::-1]
        assert tuple(found) in shared and len(found) == max(map(len, shared))
        assert tuple(one[place] for place in reversed(_places(one, other))) in shared
        assert len(_places(one, other)) == len(found)
