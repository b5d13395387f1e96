"""A small task for the tests: two groups of prompts, and a score of any answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from specattn.evaluation.tasks.base import LeftOut, Sample, Task


@dataclass(frozen=True)
class Copy(Task):
    """Ask to go on with a letter. The score only tells outputs apart: a random model has no right answers."""

    name = "copy"
    metric = "share"
    count: int = 3
    long: int = 0

    def samples(self, pair: object) -> Iterator[Sample | LeftOut]:
        for number in range(self.count):
            for group, letter in (("vowel", "aei"[number % 3]), ("consonant", "bcd"[number % 3])):
                prompt = f"{number} {letter * (20 + 3 * number)}"
                yield Sample(f"{group}-{number}", prompt, [letter], 7, group, metadata={"number": number})
        for number in range(self.long):
            yield Sample(f"long-{number}", "x" * 2000, ["x"], 7, "vowel")
        yield LeftOut("missing", "no data", "vowel")

    def score(self, sample: Sample, output: str) -> float:
        return sum(map(ord, output)) % 97 / 96
