"""Passkey retrieval (Mohtashami and Jaggi 2023): digits that are hidden in filler, to be said again at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from specattn.evaluation.tasks.base import Sample, Task
from specattn.evaluation.tasks.haystack import NOISE, budget, fit, hide
from specattn.evaluation.tasks.options import Integers
from specattn.evaluation.tasks.words import numbers
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

TEMPLATE = """\
Somewhere in the following text, which says nothing else of interest, there is a pass key. Find it and remember it.

{text}

What is the pass key?"""
NEW_TOKENS = 16


@dataclass(frozen=True)
class Passkey(Task):
    """Digits at a random depth.

    Attributes:
        length: tokens of prompt and answer.
        samples_each: samples of each length.
        digits: of the pass key.
        seed: of the digits and the depths.
    """

    name = "passkey"
    metric = "accuracy"

    length: Integers = Integers((4096,))
    samples_each: int = 20
    digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, "samples", self.samples_each, 1)
        check_at_least(self.name, "digits", self.digits, 1)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample]:
        for length in self.length:
            room = budget(pair, length, NEW_TOKENS)
            for number in range(self.samples_each):
                yield self._sample(pair, length, room, number)

    def _sample(self, pair: Pair | FoundPair, length: int, room: int, number: int) -> Sample:
        random = Random(f"{self.seed}/{length}/{number}")
        depth, (key,) = random.random(), numbers(random, 1, digits=self.digits)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        prefix = "The pass key is"

        def prompt(count: int) -> str:
            return TEMPLATE.format(text=hide(NOISE.take(count), [(depth, needle)]))

        size = fit(lambda count: prompt(count) + "\n" + prefix, pair.tokenizer, room)
        return Sample(
            id=f"{length}-{number}",
            prompt=prompt(size) + "\n",
            references=[key],
            max_new_tokens=NEW_TOKENS,
            group=str(length),
            answer_prefix=prefix,
            metadata={"length": length, "depth": depth},
        )

    def score(self, sample: Sample, output: str) -> float:
        return float(sample.references[0] in output)
