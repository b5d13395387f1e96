"""Types of task options that are written as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class Integers(tuple[int, ...]):
    """Whole numbers, from text such as ``4096,8192``.

    Raises:
        ValueError: if a part is not a whole number.
    """

    def __new__(cls, values: str | Iterable[int] = ()) -> Integers:
        parts = [part for part in values.split(",") if part] if isinstance(values, str) else values
        return super().__new__(cls, map(int, parts))

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Names(tuple[str, ...]):
    """Names, from text such as ``vt,cwe``."""

    def __new__(cls, values: str | Iterable[str] = ()) -> Names:
        parts = values.split(",") if isinstance(values, str) else values
        return super().__new__(cls, (part.strip() for part in parts if part.strip()))

    def __str__(self) -> str:
        return ",".join(self)


class DataFile(str):
    """A path of a data file; empty if none was given. It is text, so that reports can hold it."""

    __slots__ = ()

    @property
    def path(self) -> Path:
        return Path(self)
