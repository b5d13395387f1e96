"""GSM8K (Cobbe et al. 2021): word problems, worked out step by step to a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specattn.evaluation.tasks.base import Sample, Task
from specattn.evaluation.tasks.data import load_rows
from specattn.evaluation.tasks.options import DataFile
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

EXAMPLES = """\
Question: A shelf has 4 boards with 12 books each. 9 books are lent out. How many books are on the shelf?
Answer: The boards hold 4 * 12 = 48 books. Without those that are lent out there are 48 - 9 = 39.
#### 39

Question: Mira buys 3 pens at $2 each and a pad for $5, and pays with a $20 note. How many dollars does she get back?
Answer: The pens cost 3 * 2 = 6 dollars. With the pad that makes 6 + 5 = 11 dollars. She gets 20 - 11 = 9 dollars back.
#### 9

Question: A train goes 60 miles an hour for 2 hours, then half as fast for 3 hours. How many miles does it go?
Answer: At first it goes 60 * 2 = 120 miles. Half as fast is 60 / 2 = 30 miles an hour, so then it goes 30 * 3 = 90 \
miles. Together that is 120 + 90 = 210.
#### 210

Question: Of 80 pupils a quarter walk to school and 30 take the bus. The others cycle. How many pupils cycle?
Answer: 80 / 4 = 20 pupils walk. Then 20 + 30 = 50 do not cycle, and 80 - 50 = 30 do.
#### 30
"""
"""Four worked problems of our own, in the form of the data set's."""

NUMBER = re.compile(r"-?\$?-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class GSM8K(Task):
    """The share of problems whose final number is right, after four worked ones.

    Attributes:
        data: the published JSON lines of the test split, or a hub id (``openai/gsm8k``).
        max_new_tokens: tokens of an answer at most.
    """

    name = "gsm8k"
    metric = "exact match"

    data: DataFile = DataFile()
    max_new_tokens: int = 320

    def __post_init__(self) -> None:
        check_at_least(self.name, "max_new_tokens", self.max_new_tokens, 1)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample]:
        for number, row in enumerate(load_rows(self.data, "question", "answer", subset="main")):
            yield Sample(
                id=f"gsm8k-{number}",
                prompt=f"{EXAMPLES}\nQuestion: {row['question']}\n",
                answer_prefix="Answer:",
                references=[row["answer"]],
                max_new_tokens=self.max_new_tokens,
                stop=("\nQuestion:",),
            )

    def score(self, sample: Sample, output: str) -> float:
        found = final_number(output)
        return float(found is not None and found == final_number(sample.references[0]))


def final_number(text: str) -> float | None:
    """The number after ``####``, or else the last one; ``None`` where there is none."""
    marked = text.split("####")
    numbers = NUMBER.findall(marked[1]) if len(marked) > 1 else []
    numbers = numbers[:1] or NUMBER.findall(text)[-1:]
    return float(re.sub(r"[$,]", "", numbers[0])) if numbers else None
