"""LongBench v2 (Bai et al. 2024): multiple-choice questions about texts of 8K to 2M words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.data import read_json, read_jsonl
from specattn.evaluation.tasks.options import DataFile, Names
from specattn.evaluation.tasks.published import Hub, check_names, cut_middle, find_file, prompts, room
from specattn.selection.checks import check_at_least, check_choice

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

HUB = Hub("THUDM/LongBench-v2")
CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
FIELDS = ("context", "question", *CHOICES, "answer")
GROUPS = ("length", "difficulty", "domain", "none")
LENGTHS = ("short", "medium", "long")


@dataclass(frozen=True)
class LongBench2(Task):
    """Zero-shot, without a chain of thought; the score is the share of right letters.

    Attributes:
        data: the file ``data.json``, the same as ``.jsonl``, or the folder of either; from the hub if empty.
        by: what the groups are: ``length``, ``difficulty``, ``domain`` or ``none``. The published accuracy is that of
            all questions alike, which ``none`` gives: the groups are not equally large.
        lengths: ask questions of these lengths only, of ``short``, ``medium`` and ``long``; all if empty.
        longest: tokens of a prompt at most; by default as many as the context has room for. What is longer loses its
            middle.
    """

    name: ClassVar[str] = "longbench2"
    metric: ClassVar[str] = "accuracy"

    data: DataFile = DataFile()
    by: str = "none"
    lengths: Names = Names()
    longest: int = 0

    def __post_init__(self) -> None:
        check_choice(self.name, "by", self.by, GROUPS)
        check_at_least(self.name, "longest", self.longest, 0)
        check_names(self.name, self.lengths, LENGTHS)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        """All questions of the lengths asked for; see :meth:`Task.samples`."""
        published = prompts("longbench2")
        free = room(pair, published["max_new_tokens"], self.longest)
        if free < 2:
            raise UsageError(
                f"longbench2: the context of {pair.context_limit:,} tokens has no room for a prompt"
            )
        for number, row in enumerate(self._rows()):
            if self.lengths and row.get("length") not in self.lengths:
                continue
            filled = {name: str(row[name]).strip() for name in FIELDS[:-1]}
            text, dropped = cut_middle(pair.tokenizer, published["prompt"].format(**filled), free)
            yield Sample(
                id=str(row.get("_id", number)),
                prompt=text,
                references=[row["answer"]],
                max_new_tokens=published["max_new_tokens"],
                group="" if self.by == "none" else str(row.get(self.by, "")),
                metadata={"dropped": dropped},
            )

    def score(self, sample: Sample, output: str) -> float:
        """1 if the output says ``The correct answer is (X)`` with the right letter, with or without parentheses."""
        said = output.replace("*", "")
        found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(
            r"The correct answer is ([A-D])", said
        )
        return float(found is not None and found[1] == sample.references[0])

    def _rows(self) -> list[dict[str, Any]]:
        path = find_file(self.data, "data.json", HUB)
        if path.suffix == ".jsonl":
            return read_jsonl(path, *FIELDS)
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UsageError(f"{path} holds no list of questions; download it again")
        for number, row in enumerate(rows, 1):
            missing = [name for name in FIELDS if not isinstance(row, dict) or name not in row]
            if missing:
                raise UsageError(f"{path}, question {number}, has no {missing[0]!r}; download it again")
        return rows
