"""What a report holds, before it is HTML or Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A table's column: its heading, and the format of its figures; without one it holds text."""

    heading: str
    form: str = ""

    def show(self, value: Any) -> str:
        """The cell of a value; a dash where there is none."""
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "–"
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Table:
    """Rows of raw values, so that a page can sort them.

    Attributes:
        marked: numbers of the rows that stand out.
        note: what the marks mean, or what else must be known to read the table.
        fold: a heading under which a page hides the table until it is asked for.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    marked: frozenset[int] = frozenset()
    note: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture, and its numbers for those who cannot see it or read it as Markdown.

    Attributes:
        svg: an ``<svg>`` element.
        caption: what it shows.
        table: what was drawn, unless a table beside it says so.
    """

    svg: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Text | Table | Figure]


@dataclass(frozen=True)
class Key:
    """A key figure: the figure, what it is, and where it comes from."""

    value: str
    what: str
    where: str


@dataclass(frozen=True)
class Report:
    """The whole page."""

    title: str
    keys: Sequence[Key] = ()
    sections: Sequence[Section] = ()
    sources: Sequence[Sequence[str]] = ()
    """File, kind and machine of each run."""
