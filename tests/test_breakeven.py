"""The choice of plans against simulated rounds, whose costs the byte model knows only in part."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from specattn.breakeven import BreakEven, Size
from specattn.byte_model import ByteModel, Footprint
from specattn.plan import Plan, candidates
from specattn.selection.registry import parse_method

GB = 10**9
BANDWIDTH = 4000 * GB
THIN = (Footprint(16 * GB, 131072), Footprint(5 * GB // 2, 32768))
FAT = (Footprint(16 * GB, 147456), Footprint(6 * GB // 5, 114688))
SPECATTN, DENSE, QUEST = (parse_method(name) for name in ("specattn", "dense", "quest"))


@dataclass
class Device:
    """Rounds as a device might run them: below the bandwidth, sparse ones further below, launches on top."""

    pair: tuple[Footprint, Footprint]
    density: float
    rate: float
    efficiency: float = 0.8
    sparse_efficiency: float = 0.5
    launch: float = 4e-4
    selection: float = 3e-4

    def seconds(self, plan: Plan, size: Size) -> float:
        target, draft = self.pair
        cache = size.tokens * target.token
        attention = cache * self.density / self.sparse_efficiency if plan.sparse else cache / self.efficiency
        steps = plan.gamma * (draft.read(size.tokens) / (BANDWIDTH * self.efficiency) + self.launch)
        passes = (target.weights / self.efficiency + attention) / BANDWIDTH
        # Rows are not quite free.
        return passes * (1 + 0.01 * plan.gamma) + steps + self.launch + self.selection * plan.sparse

    def tokens(self, plan: Plan) -> float:
        return sum(self.rate**i for i in range(plan.gamma + 1))

    def speed(self, plan: Plan, size: Size) -> float:
        return self.tokens(plan) / self.seconds(plan, size)

    def best(self, plans: list[Plan], size: Size) -> float:
        return max(self.speed(plan, size) for plan in plans)


class Simulation:
    """A policy that runs on a device, and the time that it takes."""

    def __init__(self, device: Device, plans: list[Plan], seed: int = 0) -> None:
        self.device, self.plans = device, plans
        self.policy = BreakEven(plans, ByteModel(*device.pair))
        self.random = random.Random(seed)

    def round(self, size: Size) -> tuple[float, float]:
        """Seconds of the round, and those that the best plan would have taken for as many tokens."""
        plan = self.policy.choose(size)
        seconds = self.device.seconds(plan, size)
        self.policy.observe(plan, size, seconds * self.random.uniform(0.97, 1.03))
        for _ in range(size.batch):
            accepted = 0
            while accepted < plan.gamma and self.random.random() < self.device.rate:
                accepted += 1
            self.policy.observe_request(plan, accepted, self.device.density)
        return seconds, self.device.tokens(plan) / self.device.best(self.plans, size)

    def run(self, size: Size, rounds: int) -> float:
        """How much longer it takes than the best plan would."""
        took, ideal = map(sum, zip(*(self.round(size) for _ in range(rounds)), strict=True))
        return took / ideal


SIZES = [Size(1, 2_000), Size(1, 32_000), Size(4, 4 * 8_000), Size(16, 16 * 32_000)]


@pytest.mark.parametrize("gamma", [4, "auto"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pair", [THIN, FAT], ids=["thin", "fat"])
def test_never_much_slower_than_the_best_plan(pair, size, gamma):
    plans = candidates(SPECATTN, gamma, drafting=True, fallback=True)
    for density, rate in itertools.product((0.05, 0.4), (0.3, 0.7, 0.9)):
        simulation = Simulation(Device(pair, density, rate), plans)
        simulation.run(size, 40)
        assert simulation.run(size, 500) < 1.05, (density, rate, simulation.policy.report())


def test_a_context_that_grows_crosses_from_dense_to_sparse():
    device = Device(THIN, 0.1, 0.7, selection=2e-3)
    simulation = Simulation(device, candidates(SPECATTN, 4, drafting=True, fallback=True))
    chosen, took, ideal = [], 0.0, 0.0
    for context in range(500, 40_000, 20):
        seconds, best = simulation.round(Size(8, 8 * context))
        chosen.append(simulation.policy._incumbent)
        took, ideal = took + seconds, ideal + best
    assert not chosen[40].sparse and chosen[-1].sparse
    assert took / ideal < 1.05


def test_a_change_of_the_device_is_noticed():
    """Whether the plan in use gets slower, or the one beside it faster."""
    size, plans = Size(16, 16 * 32_000), [Plan(4, True), Plan(4, False)]
    simulation = Simulation(Device(THIN, 0.5, 0.7), plans)
    for efficiency, sparse in [(0.6, True), (0.3, False), (0.6, True)]:
        simulation.device.sparse_efficiency = efficiency
        simulation.run(size, 800)
        assert simulation.policy.choose(size).sparse == sparse, efficiency
        assert simulation.run(size, 300) < 1.05


def test_bad_luck_of_the_draft_does_not_last():
    size = Size(1, 2_000)
    simulation = Simulation(Device(THIN, 0.2, 0.8), candidates(DENSE, 4, drafting=True, fallback=True))
    for _ in range(60):
        simulation.policy.observe_request(Plan(4, False), 0, 1.0)
    assert simulation.policy.choose(size).gamma == 0
    simulation.run(size, 1000)
    assert simulation.run(size, 300) < 1.05


def test_nothing_is_tried_for_the_sake_of_a_few_rounds():
    size = Size(1, 2_000)
    simulation = Simulation(Device(THIN, 0.2, 0.7), candidates(SPECATTN, 4, drafting=True, fallback=True))
    simulation.run(size, 16)
    assert set(simulation.policy.chosen) == {Plan(4, True)}
    simulation.run(size, 16)
    assert len(simulation.policy.chosen) > 1


def test_what_can_not_be_the_best_is_never_tried():
    """By the bytes a dense round takes more than three times as long."""
    simulation = Simulation(Device(THIN, 0.05, 0.9), [Plan(4, True), Plan(4, False)])
    simulation.policy.model.density = 0.05
    simulation.run(Size(16, 16 * 128_000), 500)
    assert set(simulation.policy.chosen) == {Plan(4, True)}


def test_a_plan_is_judged_by_what_is_nearest_now():
    """At every size it has a measurement that says most, until a better one is made."""
    size, plan = Size(1, 2_000), Plan(4, True)
    policy = BreakEven([plan, Plan(2, True), Plan(0, False)], ByteModel(*THIN))
    costs = []
    for other, cost in [
        (Plan(0, False), 3e-12),
        (Plan(2, True), 2e-12),
        (Plan(2, True), 1e-12),
        (plan, 5e-12),
    ]:
        policy.observe(other, size, cost * policy.model.nbytes(other, size.tokens))
        costs.append(policy.seconds(plan, size) / policy.model.nbytes(plan, size.tokens))
    assert costs == pytest.approx([3e-12, 2e-12, 1e-12, 5e-12])


def test_the_report_says_what_was_chosen_and_what_the_other_modes_would_take():
    simulation = Simulation(Device(THIN, 0.1, 0.7), candidates(SPECATTN, 4, drafting=True, fallback=True))
    simulation.run(SIZES[3], 100)
    report = simulation.policy.report()
    assert sum(report["rounds"].values()) == 100
    assert next(iter(report["rounds"])) == "sparse, gamma 4"
    assert report["density"] == pytest.approx(0.1, abs=0.01)
    assert report["acceptance"] == pytest.approx(0.7, abs=0.1)
    size, worths = report["reason"].split(": ", 1)
    assert size == "at 32,000 tokens x 16"
    first, *others = worths.split("; ")
    assert first.startswith("sparse, gamma 4: 2.") and "took" in first
    assert sorted(other.split(":")[0] for other in others) == ["dense, gamma 4", "dense, no draft"]


@pytest.mark.parametrize(
    "method,gamma,drafting,fallback,expected",
    [
        (SPECATTN, 4, True, False, ["sparse 4"]),
        (SPECATTN, 4, True, True, ["sparse 4", "dense 4", "dense 0"]),
        (DENSE, 4, True, False, ["dense 4"]),
        (DENSE, 4, True, True, ["dense 4", "dense 0"]),
        (DENSE, "auto", True, False, ["dense 1", "dense 2", "dense 4", "dense 6", "dense 8", "dense 0"]),
        (DENSE, 4, False, True, ["dense 0"]),
        (QUEST, 4, False, True, ["sparse 0", "dense 0"]),
        (QUEST, 2, True, True, ["sparse 2", "dense 2", "dense 0"]),
        (parse_method("snapkv"), 4, True, True, ["sparse 4"]),
        (parse_method("specattn:signals=both"), 4, True, True, ["sparse 4"]),
        (SPECATTN, "auto", True, False, ["sparse 1", "sparse 2", "sparse 4", "sparse 6", "sparse 8"]),
    ],
)
def test_what_there_is_to_choose_from(method, gamma, drafting, fallback, expected):
    plans = candidates(method, gamma, drafting=drafting, fallback=fallback)
    assert [f"{'sparse' if plan.sparse else 'dense'} {plan.gamma}" for plan in plans] == expected


def test_a_step_for_the_last_row_counts_in_sparse_rounds_with_proposals():
    models = {
        every_row: ByteModel(*THIN, parse_method(f"specattn:every_row={every_row}"))
        for every_row in ("true", "false")
    }
    for plan in (Plan(0, True), Plan(0, False), Plan(4, False), Plan(4, True)):
        more, usual = (models[every_row].nbytes(plan, 1000) for every_row in ("true", "false"))
        assert more - usual == (THIN[1].read(1000) if plan == Plan(4, True) else 0)
