"""Device times. What is timed should read other data at each launch, so that no cache knows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]

COPIED_BYTES = 1 << 30


def median_ms(launch: Launch) -> float:
    """Milliseconds of ``launch``, the median of many, between two events on the device, the L2 cache cleared before."""
    from triton.testing import do_bench

    return float(do_bench(launch, return_mode="median"))


def graph_us(launches: Sequence[Launch]) -> float:
    """Microseconds of one launch, of a CUDA graph of all of them: small ones are not timed by the host."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return median_ms(graph.replay) * 1e3 / len(launches)


def sequence_us(launches: Sequence[Launch]) -> float:
    """Microseconds of one launch, of all in sequence: for what a graph cannot capture, if it takes long enough."""
    return median_ms(lambda: [launch() for launch in launches]) * 1e3 / len(launches)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device: what memory can do."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)
