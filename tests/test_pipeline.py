"""What a round is said to cost: the device's time, or the host's where that is longer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specattn import pipeline
from specattn.breakeven import Size
from specattn.landed import Landed
from specattn.pipeline import Pipeline
from specattn.plan import Plan
from specattn.rounds import Flight

DEVICE = 1.0
"""Seconds of every round on the device."""


class Stage:
    """A pipeline of rounds that give each request a token, on a clock that stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.landed, self.plan, self.observed = 100.0, 0, Plan(0, False), []
        monkeypatch.setattr(pipeline, "perf_counter", lambda: self.now)
        rounds = SimpleNamespace(ahead=True, launch=self.launch, commit=lambda *_: None)
        policy = SimpleNamespace(
            choose=lambda size: self.plan,
            observe=lambda plan, size, seconds: self.observed.append((plan, seconds)),
            observe_request=lambda *_: None,
        )
        self.pipeline = Pipeline(rounds, policy, 1000, lossless=False)  # type: ignore[arg-type]
        self.active: dict[int, Any] = {0: request()}

    def launch(self, requests: Any, plan: Plan) -> Flight:
        return Flight(requests, plan, Size(1, 1), lambda: self.land(len(requests)))

    def land(self, requests: int) -> Landed:
        self.landed += 1
        return Landed([[1]] * requests, [[self.landed] * 3] * requests, DEVICE)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        list(self.pipeline.advance(self.active))


def request() -> SimpleNamespace:
    return SimpleNamespace(
        finish_reason=None,
        tokens=[0],
        limit=1000,
        length=10,
        accepted=[],
        proposed=0,
        reads=[0, 0, 0],
        push=len,
    )


def test_rounds_that_follow_each_other_cost_what_the_host_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    for seconds in (9, 9, 5, 4, 0.5):
        stage.advance(seconds)
    # The first has none before it; a host that is faster than the device is not what a round costs.
    assert [seconds for _, seconds in stage.observed] == [DEVICE, 5, 4, DEVICE]


def test_rounds_of_other_plans_or_requests_say_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    for _ in range(3):
        stage.advance(5)
    assert stage.observed[-1] == (Plan(0, False), 5)
    stage.plan = Plan(0, True)
    stage.advance(30)  # launches another plan, which has to be captured: not what the one that lands has cost
    stage.advance(5)
    assert stage.observed[-2:] == [(Plan(0, False), DEVICE), (Plan(0, True), DEVICE)]
    stage.advance(5)
    assert stage.observed[-1] == (Plan(0, True), 5)
    stage.active[1] = request()
    for _ in range(2):
        stage.advance(30)
    assert stage.observed[-2:] == [(Plan(0, True), DEVICE)] * 2
    stage.advance(5)
    assert stage.observed[-1] == (Plan(0, True), 5)
