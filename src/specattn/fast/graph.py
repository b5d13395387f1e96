"""Rounds as CUDA graphs: captured once for each shape, replayed without the host's launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specattn.fast.landing import Run

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and libraries make their handles in the first."""


class CapturedRound:
    """A round as one graph, which keeps the round: its kernels write where the round's buffers were at the capture.

    Args:
        run: the round; reads and writes tensors that keep their place.
        memory: what ``torch.cuda.graph_pool_handle`` returned; all graphs of an engine share one, since no two of
            them run at once.
    """

    def __init__(self, run: Run, memory: Any) -> None:
        self._run = run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._report = run()

    def __call__(self) -> Tensor:
        """Run the round; the report is overwritten by the next."""
        self._graph.replay()
        return self._report
