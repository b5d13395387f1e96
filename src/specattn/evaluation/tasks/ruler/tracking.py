"""RULER's variable tracking: a value is passed on from variable to variable; which ones hold it?"""

from __future__ import annotations

from itertools import pairwise
from random import Random
from string import ascii_uppercase
from typing import Any

from specattn.evaluation.tasks.haystack import NOISE, hide
from specattn.evaluation.tasks.ruler.parts import Puzzle, fitted
from specattn.evaluation.tasks.words import numbers

HOPS = 4

TEMPLATE = """\
Follow the variables that are assigned in the text. At the end you will be asked which of them hold a value.

{text}

Which variables hold the value {value}, whether they are assigned it themselves or by way of others?
"""
PREFIX = "The {count} variables that hold the value {value} are:"


def tracking(random: Random, tokenizer: Any, limit: int) -> Puzzle:
    """One chain of ``HOPS`` hops in the noise, after a short example."""
    example = _chain(random)
    names, value, statements = _chain(random)
    shown = _prompt(example, [random.random() for _ in example[2]], 5) + _prefix(example) + " "
    shown += ", ".join(example[0]) + "\n\n"
    depths = sorted(random.random() for _ in statements)
    return fitted(
        lambda count: shown + _prompt((names, value, statements), depths, count),
        _prefix((names, value, statements)),
        names,
        tokenizer,
        limit,
    )


Chain = tuple[list[str], str, list[str]]
"""Names, the value, and the statements that assign it."""


def _chain(random: Random) -> Chain:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(random.choices(ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    (value,) = numbers(random, 1, digits=5)
    statements = [f"VAR {names[0]} = {value}."]
    statements += [f"VAR {after} = VAR {before}." for before, after in pairwise(names)]
    return names, value, statements


def _prompt(chain: Chain, depths: list[float], count: int) -> str:
    _, value, statements = chain
    text = hide(NOISE.take(count), zip(sorted(depths), statements, strict=True))
    return TEMPLATE.format(text=text, value=value)


def _prefix(chain: Chain) -> str:
    return PREFIX.format(count=len(chain[0]), value=chain[1])
