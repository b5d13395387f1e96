"""InfiniteBench (Zhang et al. 2024): 12 tasks over 100K tokens: retrieval, books, dialogues, mathematics, code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from specattn.evaluation.tasks import infinitebench_scores
from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.options import DataFile, Names
from specattn.evaluation.tasks.published import Hub, check_names, cut_middle, prompts, read_rows, room
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

HUB = Hub("xinrongzhang2022/InfiniteBench")
FIELDS = ("context", "input", "answer", "options")
LETTERS = "ABCD"
OPTIONS = ("choice", "debug")
"""Scores of the tasks that have four options."""


@dataclass(frozen=True)
class InfiniteBench(Task):
    """The prompts published for open models, with the published lengths and scores; a task is a group.

    Attributes:
        data: the folder of the ``.jsonl`` files, or one of them; from the hub if empty.
        tasks: which of the 12; all if empty.
        longest: tokens of a prompt at most; by default as many as the context has room for. What is longer loses its
            middle.
    """

    name: ClassVar[str] = "infinitebench"
    metric: ClassVar[str] = "score"

    data: DataFile = DataFile()
    tasks: Names = Names()
    longest: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, "longest", self.longest, 0)
        check_names(self.name, self.tasks, list(_published()))

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample | LeftOut]:
        """All rows of the tasks; see :meth:`Task.samples`."""
        for name in check_names(self.name, self.tasks, list(_published())):
            for number, row in enumerate(read_rows(self.data, f"{name}.jsonl", HUB, FIELDS)):
                yield self._sample(pair, name, f"{name}-{number}", row)

    def score(self, sample: Sample, output: str) -> float:
        """The task's score."""
        metric = getattr(infinitebench_scores, _published()[sample.group]["metric"])
        return float(metric(output, sample.references))

    def _sample(self, pair: Pair | FoundPair, name: str, id: str, row: dict[str, Any]) -> Sample | LeftOut:
        published = _published()[name]
        tokens = published["max_new_tokens"]
        free = room(pair, tokens, self.longest)
        if free < 2:
            return LeftOut(id, f"the context has no room beside an answer of {tokens:,} tokens", name)
        try:
            filled = published["prompt"].format(**_filled(name, row))
            references = _references(published["metric"], row)
        except (IndexError, KeyError, TypeError, ValueError):
            return LeftOut(id, "its question, options or answer are not of the published form", name)
        text, dropped = cut_middle(pair.tokenizer, filled, free)
        return Sample(id, text, references, tokens, name, metadata={"dropped": dropped})


def _filled(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """What stands in a prompt's braces.

    Raises:
        IndexError, TypeError: if the row lacks what the task needs.
    """
    filled = {"context": row["context"], "input": row["input"]}
    if "{option_a}" in _published()[name]["prompt"]:
        a, b, c, d = row["options"]
        filled |= {"option_a": a, "option_b": b, "option_c": c, "option_d": d}
    if name == "math_find":
        target = re.findall(r"The \w+ number", row["input"])[0].lower()
        filled["prefix"] = f"What is {target} in the following list?"
    if name == "code_run":
        call = re.findall(r"func_[0-9]+\(-?[0-9]+\)", row["input"])[0]
        filled |= {"func_call": call, "func": call.partition("(")[0]}
    return filled


def _references(metric: str, row: Mapping[str, Any]) -> list[str]:
    """The right answers as text; numbers and lists of them as JSON. Of options, the text and then its letter."""
    answer = row["answer"]
    answers = answer if isinstance(answer, list) else [answer]
    if metric in OPTIONS and not (len(answers) == 2 and answers[1] in LETTERS):
        answers = [answers[0], LETTERS[row["options"].index(answers[0])]]
    if metric == "numbers" and not isinstance(answers[0], list):
        answers = [answers]
    if not answers:
        raise ValueError("it has no answer")
    return [item if isinstance(item, str) else json.dumps(item) for item in answers]


def _published() -> dict[str, Any]:
    return dict(prompts("infinitebench")["datasets"])
