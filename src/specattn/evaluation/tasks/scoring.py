"""Scores beside the engine: a program that runs for seconds must not hold up the answers of the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from specattn.evaluation.tasks.run_folder import Answer

WORKERS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Answers that are scored at once. A core is left to the engine, and programs under a time limit get one each."""


class Scoring:
    """A context in which answers are scored by other threads, and kept by this one as their scores come.

    What is pending at the end of the block is finished and kept, after an error or an interruption too. Another
    interruption drops what has no score yet: such answers are not kept, so that their samples are asked again.
    """

    def __init__(self, keep: Callable[[Answer], None]) -> None:
        """``keep`` gets each answer, in the order of the scores' ends."""
        self._keep = keep
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="specattn-score")
        self._pending: list[Future[Answer]] = []
        self._error: BaseException | None = None

    def submit(self, score: Callable[[], Answer]) -> None:
        """Let a thread make an answer with its score."""
        self._pending.append(self._pool.submit(score))

    def collect(self) -> None:
        """Keep the answers that are ready; does not wait.

        Raises:
            BaseException: the first error of a score, or of ``keep``.
        """
        self._keep_ready()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish()
        except KeyboardInterrupt:
            if kind is None:  # the first one
                self._finish()
            raise
        finally:
            # Nothing is pending here unless the wait was interrupted for good.
            self._pool.shutdown(wait=False, cancel_futures=True)
        if kind is None and self._error is not None:
            raise self._error

    def _finish(self) -> None:
        while self._pending:
            wait(self._pending, return_when=FIRST_COMPLETED)
            self._keep_ready()

    def _keep_ready(self) -> None:
        """Note the first error and go on: the others' answers are none the worse for it."""
        for future in [future for future in self._pending if future.done()]:
            self._pending.remove(future)
            failure = future.exception()
            try:
                if failure is None:
                    self._keep(future.result())
            except Exception as error:
                failure = error
            self._error = self._error or failure
