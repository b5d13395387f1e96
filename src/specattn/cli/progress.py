"""Progress bars on stderr, for callbacks that name what they have done and how much of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO


class Bars:
    """A bar for each thing in progress, made when it is first heard of and cleared when it is complete.

    Nothing is drawn where stderr is not a terminal. Use it as a context manager, and call it as
    ``bars(what, count)``.

    Args:
        total: how much there is to do of a thing, or ``None`` if nobody knows.
    """

    def __init__(self, total: Callable[[str], int | None], *, file: TextIO | None = None) -> None:
        self._total = total
        self._file = file or sys.stderr
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def __call__(self, what: str, count: int) -> None:
        """``count`` more of ``what`` was done."""
        if not self._file.isatty():
            return
        if what not in self._bars:
            self._bars[what] = self._open(what)
        bar = self._bars[what]
        bar.update(count)
        if bar.total is not None and bar.n >= bar.total:
            self._bars.pop(what).close()

    def _open(self, what: str) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=what,
            total=self._total(what),
            unit="",
            file=self._file,
            leave=False,
            dynamic_ncols=True,
        )
