"""The Triton nucleus with its sampled tail against the reference: interpreted, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.tail_lists_reference import tail_lists_reference
from specattn.selection.base import Selection
from specattn.selection.weighted_tail import UNIT

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

from specattn.kernels.nucleus_lists import empty_lists
from specattn.kernels.tail_lists import tail_lists
from specattn.kernels.threshold_triton import Blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
POISON = 123_456_789
WHOLE = Blocks(resident=1024, tile=1024, warps=1, registers=128)
PARTS = Blocks(resident=256, tile=128, warps=1, registers=128)


def attention(*shape: int, temperature: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * temperature).softmax(-1)


def shifts_for(scores: Tensor, seed: int = 0) -> Tensor:
    return torch.randint(UNIT, scores.shape[:-1], generator=torch.Generator().manual_seed(seed))


def poisoned(scores: Tensor, capacity: int) -> Selection:
    out = empty_lists(scores, capacity)
    out.indices.fill_(POISON)
    out.counts.fill_(POISON)
    return Selection(out.indices, out.counts, torch.full_like(out.indices, float("nan"), dtype=torch.float32))


def run(scores, p, lengths, draws, shifts, blocks=PARTS, tile=128, capacity=None, **options) -> Selection:
    scores = scores.to(DEVICE)
    capacity = scores.shape[-1] if capacity is None else capacity
    lengths, draws = (torch.as_tensor(each, dtype=torch.int32, device=DEVICE) for each in (lengths, draws))
    out = poisoned(scores, capacity)
    got = tail_lists(
        *(scores, p, lengths, draws, shifts.to(DEVICE)),
        **{"capacity": capacity, "out": out, "blocks": blocks, "tile": tile, **options},
    )
    assert got is out and got.log_weights is not None
    return Selection(got.indices.cpu(), got.counts.cpu(), got.log_weights.cpu())


def assert_same(got: Selection, scores, p, lengths, draws, shifts, **options) -> None:
    """Probabilities in float32 move a token's place on the comb's line by a millionth: too little to be seen here."""
    capacity = options.pop("capacity", scores.shape[-1])
    expected = tail_lists_reference(
        *(scores, p, torch.as_tensor(lengths), torch.as_tensor(draws), shifts), capacity=capacity, **options
    )
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.log_weights, expected.log_weights, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.log_weights == 0, expected.log_weights == 0), "exact where it is certain"


@pytest.mark.parametrize(("length", "blocks"), [(1, PARTS), (127, PARTS), (300, WHOLE), (700, PARTS)])
@pytest.mark.parametrize("temperature", [1e-3, 2.0, 6.0])
def test_equals_the_reference(length, blocks, temperature):
    scores = attention(2, 2, length, temperature=temperature, seed=length)
    case = (scores, 0.6, [length, max(1, length * 2 // 3)], [20, 9], shifts_for(scores))
    assert_same(run(*case, a=0.2, blocks=blocks), *case, a=0.2)


@pytest.mark.parametrize("a", [0.01, 0.5, 1.0])
def test_forced_positions_and_tokens_that_are_certain(a):
    """A few of those that the nucleus leaves out are far heavier than the others, in steps."""
    scores = attention(2, 1, 500, temperature=0.3, seed=1)
    scores[..., 100:110] *= 200.0 ** torch.arange(10).div(9)
    options = {"a": a, "sink": 4, "recent": 9}
    case = (scores, 0.2, [500, 333], [30, 12], shifts_for(scores, 1))
    got = run(*case, **options)
    assert_same(got, *case, **options)


@pytest.mark.parametrize("power", [0.5, 0.8])
def test_shrunken_weights(power):
    scores = attention(2, 2, 300, seed=7)
    case = (scores, 0.6, [300, 210], [25, 9], shifts_for(scores, 7))
    got = run(*case, a=0.2, power=power)
    assert_same(got, *case, a=0.2, power=power)
    torch.testing.assert_close(got.log_weights, power * run(*case, a=0.2).log_weights)


@pytest.mark.parametrize("draws", [1, 2, 200, 1000])
def test_one_draw_and_all(draws):
    scores = attention(1, 3, 200, seed=2)
    case = (scores, 0.5, [180], [draws], shifts_for(scores, 2))
    got = run(*case, a=0.2, recent=3)
    assert_same(got, *case, a=0.2, recent=3)
    if draws >= 200:
        assert got.counts.tolist() == [[180] * 3] and (got.log_weights == 0).all()


def test_padded_slots_empty_rows_and_room_behind_a_list():
    scores = attention(4, 2, 140, seed=3)
    case = (scores, 0.5, [140, 0, 1, 5], [8, 8, 8, 2], shifts_for(scores, 3))
    options = {"a": 0.2, "capacity": 300, "sink": 2, "recent": 2}
    got = run(*case, **options)
    assert_same(got, *case, **options)
    assert got.counts[1].tolist() == [0, 0] and (got.indices[1] == -1).all()


def test_what_lies_beyond_the_length_does_not_matter():
    scores = attention(1, 2, 300, seed=4)
    shifts = shifts_for(scores, 4)
    clean = run(scores, 0.6, [200], [15], shifts, a=0.2)
    scores[..., 200:] = float("nan")
    found = run(scores, 0.6, [200], [15], shifts, a=0.2)
    assert torch.equal(found.indices, clean.indices) and torch.equal(found.log_weights, clean.log_weights)


@pytest.mark.parametrize("p", [1.0, 0.999999])
def test_nothing_is_left_to_draw_from_or_only_zeros_are(p):
    scores = attention(1, 1, 160, seed=5)
    scores[..., 50:150] = 0.0
    case = (scores, p, [160], [10], shifts_for(scores, 5))
    assert_same(run(*case, a=0.2), *case, a=0.2)


def test_rows_of_a_larger_buffer_in_sixteen_bits():
    buffer = attention(2, 3, 2, 401, seed=6).to(torch.float16)
    scores = buffer[:, 1, :, :333]
    case = (scores, 0.6, [333, 200], [25, 25], shifts_for(scores, 6))
    assert_same(run(*case, a=0.2), *case, a=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 0.0}, "p = 0.0"),
        ({"a": 0.0}, "a = 0.0"),
        ({"power": 1.5}, "power = 1.5"),
        ({"capacity": 7}, "capacity = 7"),
        ({"draws": torch.ones(3)}, r"draws \[3\]"),
        ({"shifts": torch.zeros(2, 2).long()}, r"shifts \[2, 2\]"),
        ({"out": Selection(torch.empty(2, 8).int(), torch.empty(2).int())}, "no contiguous log_weights"),
        ({"lengths": torch.tensor([4])}, "lengths has shape"),
    ],
)
def test_refusals(changes, message):
    arguments = {
        "scores": torch.rand(2, 8),
        "p": 0.9,
        "lengths": torch.tensor([8, 8]),
        "draws": torch.tensor([2, 2]),
        "shifts": torch.zeros(2, dtype=torch.int64),
        "a": 0.2,
        "capacity": 8,
    }
    with pytest.raises(UsageError, match=message):
        tail_lists(**{**arguments, **changes})
