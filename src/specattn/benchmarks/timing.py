"""Device times. What is timed should read other data at each launch, so that no cache knows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from statistics import median
from typing import Protocol, TypeVar

import torch

Launch = Callable[[], object]
Result = TypeVar("Result")

WARM_UPS = 3

COPIED_BYTES = 1 << 30


def median_ms(launch: Launch) -> float:
    """Milliseconds of ``launch``, the median of many, between two events on the device, the L2 cache cleared before."""
    from triton.testing import do_bench

    return float(do_bench(launch, return_mode="median"))


def captured(run: Callable[[], Result]) -> Callable[[], Result]:
    """``run`` as a CUDA graph, after a run without: a call replays it, over what the capture returned."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    @wraps(run)  # and so kept: the graph writes into what it owns
    def replay() -> Result:
        graph.replay()
        return result

    return replay


def graph_us(launches: Sequence[Launch]) -> float:
    """Microseconds of one launch, of a CUDA graph of all of them: small ones are not timed by the host."""
    return median_ms(captured(lambda: [launch() for launch in launches])) * 1e3 / len(launches)


class Timer(Protocol):
    """Times what takes milliseconds.

    Attributes:
        repeats: runs whose median counts.
    """

    @property
    def repeats(self) -> int: ...

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        """``run`` as it is to be timed: without the host's part of it, if that can be."""
        ...

    def once(self, run: Callable[[], Result]) -> tuple[Result, float]:
        """What a captured ``run`` returns, and its milliseconds on the device."""
        ...

    def median_ms(self, run: Callable[[], object], reset: Launch) -> float:
        """Milliseconds of ``run`` among others of its kind; captures it first. ``reset`` precedes each, untimed."""
        ...


@dataclass(frozen=True)
class GraphTimer:
    """A :class:`Timer` of CUDA graphs."""

    repeats: int = 50

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        return captured(run)

    def once(self, run: Callable[[], Result]) -> tuple[Result, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)

    def median_ms(self, run: Callable[[], object], reset: Launch) -> float:
        replay = self.capture(run)
        timings = []
        for _ in range(WARM_UPS + self.repeats):
            reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            replay()
            end.record()
            timings.append((start, end))
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in timings[WARM_UPS:])


def sequence_us(launches: Sequence[Launch]) -> float:
    """Microseconds of one launch, of all in sequence: for what a graph cannot capture, if it takes long enough."""
    return median_ms(lambda: [launch() for launch in launches]) * 1e3 / len(launches)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device: what memory can do."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)
