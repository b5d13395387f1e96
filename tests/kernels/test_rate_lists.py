"""Lists drawn at one rate by Triton against the reference: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.rate_lists_reference import rate_lists_reference
from specattn.selection.base import Selection
from specattn.selection.weighted_tail import UNIT

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from specattn.kernels.nucleus_lists import empty_lists
from specattn.kernels.rate_lists import rate_lists

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 123_456_789


def attention(*shape: int, temperature: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * temperature).softmax(-1)


def shifts_for(scores: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(UNIT, scores.shape[:-1], generator=torch.Generator().manual_seed(seed))


def run(scores, rate, lengths, shifts, a=0.2, tile=128, capacity=None, **options) -> Selection:
    """By the kernel, into poisoned lists."""
    scores = scores.to(DEVICE)
    capacity = scores.shape[-1] if capacity is None else capacity
    lists = empty_lists(scores, capacity)
    nan = torch.full_like(lists.indices, float("nan"), dtype=torch.float32)
    out = Selection(lists.indices.fill_(POISON), lists.counts.fill_(POISON), nan)
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=DEVICE)
    options |= {"capacity": capacity, "out": out, "tile": tile}
    assert rate_lists(scores, rate, lengths, shifts.to(DEVICE), a, **options) is out
    return Selection(out.indices.cpu(), out.counts.cpu(), nan.cpu())


def assert_same(got: Selection, scores, rate, lengths, shifts, a=0.2, capacity=None, **options) -> None:
    """Probabilities in float32 move a token's place on the comb's line by a millionth: too little to be seen here."""
    options["capacity"] = scores.shape[-1] if capacity is None else capacity
    expected = rate_lists_reference(scores, rate, torch.as_tensor(lengths), shifts, a, **options)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.log_weights, expected.log_weights, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.log_weights == 0, expected.log_weights == 0), "exact where it is certain"


def by_definition(scores, rate, length, shift, a, power, sink, recent) -> list[tuple[int, float]]:
    """Positions and weights of one row, token by token."""
    mass, before, listed = float(scores[:length].double().sum()), 0.0, []
    tooth = shift / UNIT
    for token in range(length):
        if token < sink or token >= length - recent:
            listed.append((token, 1.0))
            continue
        chance = min(1.0, rate * ((1 - a) * length * float(scores[token]) / mass + a))
        # The teeth are at the shift and at distances of 1 from it.
        teeth = [tooth + number for number in range(int(before) - 1, int(before + chance) + 2)]
        if any(before <= each < before + chance for each in teeth):
            listed.append((token, chance**-power))
        before += chance
    return listed


@pytest.mark.parametrize("power", [1.0, 0.7])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_both_are_the_definition(rate, power):
    scores = attention(2, 3, 150, seed=8)
    lengths, shifts, options = [150, 97], shifts_for(scores, 8), {"power": power, "sink": 3, "recent": 5}
    reference = rate_lists_reference(
        scores, rate, torch.tensor(lengths), shifts, 0.3, capacity=150, **options
    )
    for lists in (reference, run(scores, rate, lengths, shifts, 0.3, **options)):
        assert lists.log_weights is not None
        for request, length in enumerate(lengths):
            for row in range(3):
                shift = int(shifts[request, row])
                expected = by_definition(scores[request, row], rate, length, shift, 0.3, *options.values())
                count = int(lists.counts[request, row])
                assert lists.indices[request, row, :count].tolist() == [token for token, _ in expected]
                weights = lists.log_weights[request, row, :count].exp().tolist()
                assert weights == pytest.approx([weight for _, weight in expected], rel=1e-4)


@pytest.mark.parametrize("length", [1, 127, 300, 701])
@pytest.mark.parametrize("temperature", [1e-3, 2.0, 6.0])
def test_equals_the_reference(length, temperature):
    scores = attention(2, 2, length, temperature=temperature, seed=length)
    case = (scores, 0.2, [length, max(1, length * 2 // 3)], shifts_for(scores))
    assert_same(run(*case, sink=4, recent=9), *case, sink=4, recent=9)


@pytest.mark.parametrize("a", [0.01, 1.0])
@pytest.mark.parametrize("rate", [0.01, 1.0, 7.0])
def test_few_draws_and_all(rate, a):
    scores = attention(1, 3, 200, seed=2)
    case = (scores, rate, [180], shifts_for(scores, 2), a)
    got = run(*case, recent=3)
    assert_same(got, *case, recent=3)
    if a == 1 and rate >= 1:
        assert got.counts.tolist() == [[180] * 3] and (got.log_weights == 0).all()


def test_padded_slots_empty_rows_and_room_behind_a_list():
    scores = attention(4, 2, 140, seed=3)
    scores[3] = 0
    case, options = (scores, 0.3, [140, 0, 1, 120], shifts_for(scores, 3)), {"capacity": 300, "sink": 2}
    got = run(*case, **options)
    assert_same(got, *case, **options)
    assert got.counts[1].tolist() == [0, 0] and (got.indices[1] == -1).all()
    assert got.counts[3, 0] > 10, "without any mass the draws are uniform"


def test_what_is_no_score_does_not_count_and_what_lies_beyond_the_length_does_not_matter():
    scores = attention(1, 2, 300, seed=4)
    scores[..., 40], scores[..., 41], scores[..., 42] = float("nan"), float("inf"), -3.0
    case = (scores, 0.25, [200], shifts_for(scores, 4))
    got = run(*case)
    assert_same(got, *case)
    zeros = scores.clone()
    zeros[..., 40:43], zeros[..., 200:] = 0.0, float("nan")
    again = run(zeros, *case[1:])
    assert torch.equal(again.indices, got.indices) and torch.equal(again.log_weights, got.log_weights)


def test_rows_of_a_larger_buffer_in_sixteen_bits():
    buffer = attention(2, 3, 2, 401, seed=6).to(torch.bfloat16)
    scores = buffer[:, 1, :, :333]
    case = (scores, 0.2, [333, 200], shifts_for(scores, 6))
    assert_same(run(*case), *case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate = 0.0"),
        ({"rate": float("inf")}, "rate = inf"),
        ({"a": 0.0}, "a = 0.0"),
        ({"power": 0.0}, "power = 0.0"),
        ({"capacity": 7}, "capacity = 7"),
        ({"shifts": torch.zeros(2, 2).long()}, r"shifts \[2, 2\]"),
        ({"out": Selection(torch.empty(2, 8).int(), torch.empty(2).int())}, "no contiguous log_weights"),
        ({"lengths": torch.tensor([4])}, "lengths has shape"),
    ],
)
def test_refusals(changes, message):
    arguments = {
        "scores": torch.rand(2, 8),
        "rate": 0.2,
        "lengths": torch.tensor([8, 8]),
        "shifts": torch.zeros(2, dtype=torch.int64),
        "a": 0.2,
        "capacity": 8,
    }
    with pytest.raises(UsageError, match=message):
        rate_lists(**{**arguments, **changes})
