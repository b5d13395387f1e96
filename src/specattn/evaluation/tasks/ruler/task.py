"""The 13 tasks together, and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.haystack import NOISE, budget, text_haystack
from specattn.evaluation.tasks.options import DataFile, Integers, Names
from specattn.evaluation.tasks.ruler.counting import common_words, frequent_words
from specattn.evaluation.tasks.ruler.needles import Needles
from specattn.evaluation.tasks.ruler.parts import Make
from specattn.evaluation.tasks.ruler.questions import read_questions
from specattn.evaluation.tasks.ruler.tracking import tracking
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

NEW_TOKENS = {
    "niah_single_1": 128,
    "niah_single_2": 128,
    "niah_single_3": 128,
    "niah_multikey_1": 128,
    "niah_multikey_2": 128,
    "niah_multikey_3": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
"""The tasks, and the tokens of their answers."""


@dataclass(frozen=True)
class Ruler(Task):
    """All 13 tasks, or some.

    Attributes:
        task: their names; all if none is given.
        length: tokens of prompt and answer.
        samples_each: samples of each task and length.
        text: a text file as the haystack in place of RULER's essays; without one, made-up text.
        qa: JSON files of SQuAD (``qa_1``) and HotpotQA (``qa_2``); what has none is left out.
        seed: of everything that is drawn.
    """

    name = "ruler"
    metric = "share of references found"

    task: Names = Names()
    length: Integers = Integers((4096,))
    samples_each: int = 20
    text: DataFile = DataFile()
    qa: Names = Names()
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, "samples", self.samples_each, 1)
        unknown = [name for name in self.task if name not in NEW_TOKENS]
        if unknown:
            raise UsageError(f"RULER has no task {unknown[0]!r}; its tasks: {', '.join(NEW_TOKENS)}")

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        makers = self._makers()
        for length in self.length:
            for name in self.task or NEW_TOKENS:
                for number in range(self.samples_each):
                    yield self._item(pair, makers.get(name), name, length, number)

    def _item(
        self, pair: Pair | FoundPair, make: Make | None, name: str, length: int, number: int
    ) -> Sample | LeftOut:
        id, group = f"{name}-{length}-{number}", f"{name} {length}"
        if make is None:
            return LeftOut(id, f"{name} needs its data: give a JSON file with --qa", group)
        random = Random(f"{self.seed}/{name}/{length}/{number}")
        try:
            puzzle = make(random, pair.tokenizer, budget(pair, length, NEW_TOKENS[name]))
        except UsageError as error:  # this task cannot be so short or so long, others may
            return LeftOut(id, f"{name}: {error}", group)
        return Sample(
            id=id,
            prompt=puzzle.prompt,
            references=puzzle.references,
            max_new_tokens=NEW_TOKENS[name],
            group=group,
            answer_prefix=puzzle.answer_prefix,
            metadata={"task": name, "length": length},
        )

    def _makers(self) -> dict[str, Make]:
        essay = text_haystack(self.text)
        return {
            "niah_single_1": Needles(NOISE),
            "niah_single_2": Needles(essay),
            "niah_single_3": Needles(essay, uuid_values=True),
            "niah_multikey_1": Needles(essay, names=4),
            "niah_multikey_2": Needles(None),
            "niah_multikey_3": Needles(None, uuid_names=True, uuid_values=True),
            "niah_multivalue": Needles(essay, values=4),
            "niah_multiquery": Needles(essay, names=4, asked=4),
            "vt": tracking,
            "cwe": common_words,
            "fwe": frequent_words,
            **{found.name: found for found in map(read_questions, self.qa)},
        }

    def score(self, sample: Sample, output: str) -> float:
        """The share of references that the output holds, in any case; for questions, whether it holds one of them."""
        text = output.lower()
        found = [reference.lower() in text for reference in sample.references]
        if str(sample.metadata["task"]).startswith("qa"):
            return float(any(found))
        return sum(found) / len(found)
