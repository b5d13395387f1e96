"""ROUGE-L in the two forms that long-context benchmarks are scored with (Lin 2004, sections 3.1 and 3.2).

They differ in what a sentence and a word is, and in how words that come more than once are counted: scores are
comparable with published ones only if all of that is the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

TINY = 1e-8
"""What the ``rouge`` package adds to the denominator of its F score."""

Words = Sequence[str]


def rouge_l(output: str, reference: str) -> float:
    """The F score as the package ``rouge`` 1.0 computes it: sentences end at a period, each word counts once.

    A text without any word scores 0.
    """
    said, wanted = _sentences(output), _sentences(reference)
    if not said or not wanted:
        return 0.0
    shared = {word for sentence in wanted for other in said for word in _common(sentence, other)}
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    precision = len(shared) / len({word for sentence in said for word in sentence})
    return 2 * precision * recall / (precision + recall + TINY)


def rouge_l_sum(output: str, reference: str) -> float:
    """The F score of ``rougeLsum`` in ``rouge_score`` without stemming: a sentence is a line.

    Words are runs of ASCII letters and digits; each counts at most as often as it stands in both texts.
    """
    said, wanted = _lines(output), _lines(reference)
    left = Counter(word for line in said for word in line)
    size_said, size_wanted = left.total(), sum(map(len, wanted))
    hits = 0
    for line in wanted:
        matched = sorted({place for other in said for place in _places(line, other)})
        for word in (line[place] for place in matched):
            hits += left[word] > 0
            left[word] -= left[word] > 0
    if not hits:
        return 0.0
    precision, recall = hits / size_said, hits / size_wanted
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[Words]:
    """Words between single spaces, as the package cuts them: a sentence of blanks has one empty word."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _lines(text: str) -> list[Words]:
    return [re.findall(r"[a-z0-9]+", line.lower()) for line in text.split("\n") if line]


def _common(reference: Words, output: Words) -> list[str]:
    """A longest common subsequence; of several, the one whose walk back prefers to shorten ``output``."""
    lengths = _lengths(reference, output)
    i, j, found = len(reference), len(output), []
    while i and j:
        if reference[i - 1] == output[j - 1]:
            found.append(reference[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _places(reference: Words, output: Words) -> list[int]:
    """Places in ``reference`` of a longest common subsequence; the walk back prefers to shorten ``reference``."""
    lengths = _lengths(reference, output)
    i, j, found = len(reference), len(output), []
    while i and j:
        if reference[i - 1] == output[j - 1]:
            found.append(i - 1)
            i, j = i - 1, j - 1
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found


def _lengths(one: Words, other: Words) -> list[list[int]]:
    """``[i][j]``: how long the longest common subsequence of the first i and the first j words is."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        row, above = [0], table[-1]
        for j, candidate in enumerate(other, 1):
            row.append(above[j - 1] + 1 if word == candidate else max(above[j], row[-1]))
        table.append(row)
    return table
