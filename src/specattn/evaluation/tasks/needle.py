"""A needle in a haystack, over a grid of depths and lengths (Kamradt 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import Sample, Task
from specattn.evaluation.tasks.haystack import Haystack, budget, fit, hide, text_haystack
from specattn.evaluation.tasks.options import DataFile, Integers
from specattn.evaluation.tasks.words import keys, numbers
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

TEMPLATE = """\
Read the following text. A question about it comes at its end.

{text}

What is the access code of the {key} vault?"""
NEW_TOKENS = 24


@dataclass(frozen=True)
class Needle(Task):
    """One sentence with a number at a given depth of a text.

    Attributes:
        length: tokens of prompt and answer.
        depth: where the sentence stands, in percent of the text.
        samples_each: samples of each cell of the grid.
        text: a text file to hide it in; without one, made-up text.
        seed: of the keys, the numbers and where in the text the haystack begins.
    """

    name = "needle"
    metric = "accuracy"

    length: Integers = Integers((2048, 4096, 8192))
    depth: Integers = Integers((0, 25, 50, 75, 100))
    samples_each: int = 4
    text: DataFile = DataFile()
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, "samples", self.samples_each, 1)
        wrong = [depth for depth in self.depth if not 0 <= depth <= 100]
        if wrong:
            raise UsageError(f"--depth {wrong[0]} is not a percentage; give 0 to 100")

    @cached_property
    def _haystack(self) -> Haystack:
        return text_haystack(self.text)

    def samples(self, pair: Pair | FoundPair) -> Iterator[Sample]:
        for length in self.length:
            room = budget(pair, length, NEW_TOKENS)
            for depth in self.depth:
                for number in range(self.samples_each):
                    yield self._sample(pair, length, room, depth, number)

    def _sample(self, pair: Pair | FoundPair, length: int, room: int, depth: int, number: int) -> Sample:
        # The same needles and texts at every depth: a row of the grid differs in the depth alone.
        random = Random(f"{self.seed}/{length}/{number}")
        (key,), (code,) = keys(random, 1), numbers(random, 1)
        needle = f"The access code of the {key} vault is {code}."
        prefix = f"The access code of the {key} vault is"
        start = random.randrange(len(self._haystack.sentences))

        def prompt(count: int) -> str:
            text = hide(self._haystack.take(count, start), [(depth / 100, needle)])
            return TEMPLATE.format(text=text, key=key)

        size = fit(lambda count: prompt(count) + "\n" + prefix, pair.tokenizer, room)
        return Sample(
            id=f"{length}-{depth}-{number}",
            prompt=prompt(size) + "\n",
            references=[code],
            max_new_tokens=NEW_TOKENS,
            group=f"{length} at {depth} %",
            answer_prefix=prefix,
            metadata={"length": length, "depth": depth / 100},
        )

    def score(self, sample: Sample, output: str) -> float:
        return float(sample.references[0] in output)
