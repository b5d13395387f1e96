"""RULER's eight needle tasks: single keys, keys among others, several values, several keys asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.tasks.haystack import Haystack, hide
from specattn.evaluation.tasks.ruler.parts import Puzzle, fitted
from specattn.evaluation.tasks.words import KEYS, keys, numbers, uuids

TEMPLATE = """\
The text below holds special magic {kind} that belong to names. Remember them; a question about them comes at the end.

{text}

{question}"""


@dataclass(frozen=True)
class Needles:
    """Sentences that give names their values, in a haystack.

    Attributes:
        haystack: the sentences around them; ``None``: other needles.
        names: how many names there are, where the haystack holds none.
        values: of each name.
        asked: names that the question asks for.
        uuid_names, uuid_values: UUIDs instead of words and numbers.
    """

    haystack: Haystack | None
    names: int = 1
    values: int = 1
    asked: int = 1
    uuid_names: bool = False
    uuid_values: bool = False

    def __call__(self, random: Random, tokenizer: Any, limit: int) -> Puzzle:
        make: Callable[[Random, int], list[str]] = uuids if self.uuid_names else keys
        names = make(random, self.names)
        given = [(name, value) for name in names for value in self._values(random, self.values)]
        asked = names[: self.asked]
        needles = [(random.random(), self._sentence(*pair)) for pair in given]
        around = self._among_needles(random, needles, set(names)) if self.haystack is None else None
        start = random.randrange(len(self.haystack.sentences)) if self.haystack is not None else 0

        def render(count: int) -> str:
            if around is not None:
                text = around(count)
            else:
                assert self.haystack is not None
                text = hide(self.haystack.take(count, start), needles)
            return TEMPLATE.format(kind=self._kind(several=True), text=text, question=self._question(asked))

        references = [value for name, value in given if name in asked]
        return fitted(render, self._prefix(asked), references, tokenizer, limit)

    def _among_needles(
        self, random: Random, needles: Sequence[tuple[float, str]], taken: set[str]
    ) -> Callable[[int], str]:
        """Other needles as the haystack, as many as are asked for: the same ones each time."""
        others: list[str] = []
        names = () if self.uuid_names else [name for name in keys(random, KEYS) if name not in taken]

        def text(count: int) -> str:
            if names and count > len(names):
                raise UsageError(
                    f"the length asks for {count:,} names and there are {len(names):,}; use a shorter --length"
                )
            while len(others) < count:
                name = names[len(others)] if names else uuids(random, 1)[0]
                others.append(self._sentence(name, *self._values(random, 1)))
            return hide(others[:count], needles, separator="\n")

        return text

    def _values(self, random: Random, count: int) -> list[str]:
        return uuids(random, count) if self.uuid_values else numbers(random, count)

    def _kind(self, *, several: bool) -> str:
        return ("UUID" if self.uuid_values else "number") + "s" * several

    def _sentence(self, name: str, value: str) -> str:
        return f"One of the special magic {self._kind(several=True)} for {name} is: {value}."

    def _question(self, asked: Sequence[str]) -> str:
        if self.asked * self.values == 1:
            return (
                f"What is the special magic {self._kind(several=False)} for {asked[0]} in the text above?\n"
            )
        return f"What are all the special magic {self._kind(several=True)} for {_listed(asked)} in the text above?\n"

    def _prefix(self, asked: Sequence[str]) -> str:
        several = self.asked * self.values > 1
        start = "The special magic " + self._kind(several=several)
        return f"{start} for {_listed(asked)} in the text {'are' if several else 'is'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
