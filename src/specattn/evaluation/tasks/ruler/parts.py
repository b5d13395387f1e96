"""What a RULER task produces, before it becomes a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from specattn.evaluation.tasks.haystack import fit


@dataclass(frozen=True)
class Puzzle:
    """A prompt of the right length.

    Attributes:
        prompt: the text and the question.
        answer_prefix: how the answer begins.
        references: all right answers.
    """

    prompt: str
    answer_prefix: str
    references: Sequence[str]


Make = Callable[[Random, Any, int], Puzzle]
"""A puzzle from random numbers, a tokenizer and the tokens of prompt and answer prefix."""


def fitted(
    render: Callable[[int], str],
    prefix: str,
    references: Sequence[str],
    tokenizer: Any,
    limit: int,
    **sizes: int,
) -> Puzzle:
    """The puzzle whose prompt is as long as ``limit`` allows; ``render`` gives the prompt of a size."""
    size = fit(lambda count: render(count) + prefix, tokenizer, limit, **sizes)
    return Puzzle(render(size), prefix, references)
