"""A small task for the tests: two groups of prompts, of one character's code in the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from specattn.evaluation.tasks.base import LeftOut, Sample, Task


@dataclass(frozen=True)
class Copy(Task):
    """Ask for a letter that the prompt repeats; what a random model answers does not matter."""

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
        return output.count(sample.references[0]) / max(1, len(output))
