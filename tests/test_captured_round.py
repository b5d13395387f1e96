"""A graph writes into the buffers of the round that it was captured from: they must live as long as it does."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from specattn.benchmarks.timing import captured
from specattn.fast.graph import WARM_UPS, CapturedRound


class Round:
    """Counts its runs."""

    def __init__(self) -> None:
        self.report = torch.zeros(1)

    def run(self) -> torch.Tensor:
        self.report += 1
        return self.report


@pytest.fixture
def without_graphs(monkeypatch):
    """Streams and graphs that do nothing, where there is no GPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())


@pytest.mark.usefixtures("without_graphs")
def test_a_graph_keeps_its_round_and_its_buffers():
    round = Round()
    alive = weakref.ref(round)
    graph = CapturedRound(round.run, memory=None)
    del round
    gc.collect()
    assert alive() is not None
    assert graph().tolist() == [WARM_UPS + 1]
    del graph
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("without_graphs")
def test_a_timed_graph_keeps_what_it_was_captured_from(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    round = Round()
    alive = weakref.ref(round)
    replay = captured(round.run)
    del round
    gc.collect()
    assert alive() is not None and replay().tolist() == [2]
