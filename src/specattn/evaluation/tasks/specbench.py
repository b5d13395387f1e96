"""Spec-Bench (Xia et al. 2024): how many draft tokens are accepted, and how fast decoding is, by category."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.data import read_jsonl
from specattn.evaluation.tasks.options import DataFile
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

SOURCE = "https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl"
MT_BENCH = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)
"""Categories that the benchmark reports as one, ``mt_bench``."""


@dataclass(frozen=True)
class SpecBench(Task):
    """Answers have no score: their accepted lengths and their speed are what is asked for.

    The first turn of each question is asked. The 80 questions of MT-bench have a second one, which builds on the
    model's own first answer and is left away.

    Attributes:
        data: the file ``question.jsonl``, or its folder.
        max_new_tokens: tokens of an answer at most.
    """

    name: ClassVar[str] = "specbench"
    metric: ClassVar[str] = ""

    data: DataFile = DataFile()
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        check_at_least(self.name, "max_new_tokens", self.max_new_tokens, 1)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        """All questions; see :meth:`Task.samples`."""
        if not self.data:
            raise UsageError(f"specbench needs its questions: download {SOURCE} and give data=question.jsonl")
        path = self.data.path / "question.jsonl" if self.data.path.is_dir() else self.data.path
        for row in read_jsonl(path, "question_id", "category", "turns"):
            id, category = str(row["question_id"]), str(row["category"])
            group = "mt_bench" if category in MT_BENCH else category
            if not row["turns"]:
                yield LeftOut(id, "it has no turns", group)
                continue
            yield Sample(
                id=id,
                prompt=str(row["turns"][0]),
                references=(),
                max_new_tokens=self.max_new_tokens,
                group=group,
                metadata={"category": category},
            )

    def score(self, sample: Sample, output: str) -> float:
        """There is none."""
        return 0.0
