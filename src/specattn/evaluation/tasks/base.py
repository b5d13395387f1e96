"""What every task has: samples to ask for, and a score of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from specattn.registry import Member

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

Message = Mapping[str, str]
"""A turn of a chat: its ``role`` and its ``content``."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unlike all others of the task.
        prompt: a text, or the messages of a chat.
        references: right answers, in the form that the task's score expects.
        max_new_tokens: tokens of the answer at most.
        group: samples of one group have figures of their own: a subtask, a category, a cell of a grid.
        answer_prefix: how the answer begins. It is part of what is read, not of the output.
        stop: strings at which the answer ends.
        metadata: anything that is kept beside the answer, as JSON.
    """

    id: str
    prompt: str | Sequence[Message]
    references: Sequence[str]
    max_new_tokens: int
    group: str = ""
    answer_prefix: str = ""
    stop: Sequence[str] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A sample that is not asked, and why; equal reasons are counted together."""

    id: str
    reason: str
    group: str = ""


@dataclass(frozen=True)
class Task(Member):
    """A frozen dataclass whose fields are the task's options, with defaults.

    Attributes:
        metric: what the score is called; empty if there is none.
    """

    metric: ClassVar[str]

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        """All samples, always the same.

        Raises:
            UsageError: if an option or a file cannot be right.
        """
        raise NotImplementedError

    def score(self, sample: Sample, output: str) -> float:
        """How good an output is, from 0 to 1. Several threads score at once."""
        raise NotImplementedError
