"""How the report of a round comes to the host: copied while the next round is already running."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from specattn.fast.requests import READS
from specattn.landed import Landed

Run = Callable[[], Tensor]
"""A round that returns its report, see :meth:`specattn.fast.requests.Requests.report`."""


class PinnedLanding:
    """A report's place in pinned memory, with the events that say when it has come.

    Args:
        batch, width: shape of the report.
    """

    def __init__(self, batch: int, width: int) -> None:
        self._host = torch.empty(batch, width, dtype=torch.int64, pin_memory=True)
        self._started, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def launch(self, run: Run) -> None:
        """Run a round and copy its report, without waiting for either."""
        self._started.record()
        self._host.copy_(run(), non_blocking=True)
        self._ended.record()

    def land(self, requests: int) -> Landed:
        """Wait for the report; padding behind the first ``requests`` is left out."""
        self._ended.synchronize()
        return _read(self._host[:requests], self._started.elapsed_time(self._ended) / 1e3)


class HostLanding:
    """The same where the device is the host: the report is there when the round returns."""

    def launch(self, run: Run) -> None:
        """Run a round."""
        started = perf_counter()
        self._report = run()
        self._seconds = perf_counter() - started

    def land(self, requests: int) -> Landed:
        """Its report."""
        return _read(self._report[:requests], self._seconds)


def _read(report: Tensor, seconds: float) -> Landed:
    """What a report says that is on the host."""
    rows, reads = report.tolist(), report[:, -READS:].view(torch.float64).tolist()
    return Landed([row[: row[-1 - READS]] for row in rows], reads, seconds)
