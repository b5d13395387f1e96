"""Lists that are drawn at one rate in all heads, against a loop over their definition and what they are meant for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specattn.errors import UsageError
from specattn.selection.base import RoundState, Selection
from specattn.selection.even_rate import even_rate_lists
from specattn.selection.registry import get_method, parse_method

LAYERS, KV_HEADS, ROWS = 2, 2, 3


def round_of(starts: list[int], length: int) -> RoundState:
    return RoundState(torch.tensor(starts, dtype=torch.int32), ROWS, length, LAYERS, KV_HEADS, 4)


def attention(batch: int, length: int, seed: int = 0) -> Tensor:
    """A peaked and a flat head in each layer."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, LAYERS, KV_HEADS, length, generator=generator)
    return (logits * torch.tensor([4.0, 0.5]).view(1, 1, 2, 1)).softmax(-1)


def own(state: RoundState, length: int) -> Tensor:
    """The sinks and the round's tokens, ``[batch, 1, 1, length]``."""
    position, ends = torch.arange(length), state.lengths[:, None]
    return (((position < 2) | (position >= ends - ROWS)) & (position < ends))[:, None, None]


def lists(state: RoundState, density: Tensor, rate: float, a=0.1, power=1.0, seed=0) -> Selection:
    forced = own(state, density.shape[-1])
    return even_rate_lists(state, forced, density, rate, a=a, power=power, seed=seed)


def by_hand(weights: list[float], rate: float, a: float) -> list[float]:
    total = sum(weights)
    return [min(1.0, rate * ((1 - a) * len(weights) * each / total + a)) for each in weights]


@pytest.mark.parametrize("rate", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("a", [0.01, 0.4])
@pytest.mark.parametrize("power", [1.0, 0.7])
def test_tokens_are_drawn_as_often_as_the_definition_says_and_weigh_accordingly(rate, a, power):
    state = round_of([200, 77], 203)
    density = attention(2, 203)
    found = lists(state, density, rate, a, power)
    assert found.log_weights is not None
    for request, layer, head in torch.cartesian_prod(*map(torch.arange, (2, LAYERS, KV_HEADS))).tolist():
        length = int(state.lengths[request])
        chance = by_hand(density[request, layer, head, :length].tolist(), rate, a)
        others = range(2, length - ROWS)
        count = int(found.counts[request, layer, head])
        assert abs(count - 2 - ROWS - sum(chance[t] for t in others)) < 1 + 1e-6
        tokens = found.indices[request, layer, head, :count].tolist()
        assert (
            tokens == sorted(tokens) and tokens[:2] == [0, 1] and tokens[-ROWS:] == [*range(length)][-ROWS:]
        )
        assert {t for t in others if chance[t] == 1} <= set(tokens)
        weights = found.log_weights[request, layer, head]
        expected = [-power * math.log(chance[t]) if t in others else 0.0 for t in tokens]
        assert weights[:count].tolist() == pytest.approx(expected, abs=1e-5)
        assert (weights[count:] == 0).all() and (found.indices[request, layer, head, count:] == -1).all()


def test_every_token_counts_once_on_average():
    trials, length = 3000, 43
    state = round_of([40], length)
    density = attention(1, length, seed=3)
    sums, squares = torch.zeros(2, LAYERS, KV_HEADS, length + 1, dtype=torch.float64)
    for seed in range(trials):
        found = lists(state, density, 0.3, a=0.2, seed=seed)
        column = torch.where(found.indices < 0, length, found.indices).long()[0]
        factors = found.log_weights[0].double().exp()
        sums.scatter_add_(-1, column, factors)
        squares.scatter_add_(-1, column, factors.square())
    mean = (sums / trials)[..., :-1]
    error = ((squares / trials)[..., :-1] - mean.square()).clamp(min=0).sqrt() / trials**0.5
    assert ((mean - 1).abs() <= 4.5 * error + 1e-6).all()
    assert (mean > 0.5).all(), "every token is drawn sometimes"


attentions = st.lists(st.floats(1e-4, 1.0), min_size=20, max_size=20).map(
    lambda w: [each / sum(w) for each in w]
)


@settings(max_examples=80)
@given(attentions, attentions, st.floats(0.02, 0.5), st.floats(1.1, 5.0))
def test_no_other_rates_of_two_heads_that_read_as_much_vary_less(first, second, rate, factor):
    """The variance of the estimated attention, ``sum w^2 (1 - pi) / pi`` over both heads."""

    def chances(rates: tuple[float, float]) -> list[tuple[float, float]]:
        pairs = ((w, own) for head, own in zip((first, second), rates, strict=True) for w in head)
        return [(w, min(1.0, own * 20 * w)) for w, own in pairs]

    def reads(rates: tuple[float, float]) -> float:
        return sum(pi for _, pi in chances(rates))

    def variance(rates: tuple[float, float]) -> float:
        return sum(w * w * (1 - pi) / pi for w, pi in chances(rates))

    more, low, high = rate * factor, 0.0, rate
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reads((more, middle)) > reads((rate, rate)) else (middle, high)
    assume(high > 1e-3)  # else the first head alone reads more
    assert reads((more, high)) == pytest.approx(reads((rate, rate)))
    assert variance((rate, rate)) <= variance((more, high)) * (1 + 1e-6)


def test_flat_heads_read_the_rate_and_peaked_ones_less():
    state = round_of([1000], 1003)
    counts = lists(state, attention(1, 1003), 0.2).counts[0] - 2 - ROWS
    assert (counts <= 0.2 * 1003 + 1).all()
    assert (counts[:, 1] > 0.18 * 1003).all(), "flat"
    assert (counts[:, 0] < 0.1 * 1003).all(), "peaked"


def test_a_rate_that_makes_all_tokens_certain_reads_everything():
    state = round_of([60], 63)
    found = lists(state, attention(1, 63), rate=10.0, a=0.1)
    assert (found.counts == 63).all() and (found.log_weights == 0).all()


def test_neighbours_and_room_behind_the_text_change_nothing():
    density = attention(1, 60, seed=3)
    alone = lists(round_of([30], 33), density[..., :33], 0.3)
    density[..., 33:] = float("nan")
    padded = lists(round_of([57, 30], 60), density.expand(2, -1, -1, -1), 0.3)
    assert torch.equal(padded.indices[1, ..., :33], alone.indices[0])
    assert torch.equal(padded.log_weights[1, ..., :33], alone.log_weights[0])


def test_the_sample_is_that_of_the_seed_and_each_head_has_its_own():
    state = round_of([300], 303)
    density = torch.full((1, LAYERS, KV_HEADS, 303), 1 / 303)
    first, again, other = (lists(state, density, 0.1, seed=seed).indices for seed in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0, 0, 0], first[0, 0, 1])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rate": -0.1}, "rate=-0.1"),
        ({"rate": math.inf}, "rate=inf"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": 0.2, "tail": 0.05}, "leave these out"),
        ({"rate": 0.2, "eps": 0.1}, "leave these out"),
        ({"rate": 0.2, "centroids": 64}, "leave these out"),
        ({"rate": 0.2, "granularity": "page"}, "leave these out"),
        ({"power": 0}, "power=0 is outside"),
        ({"power": 1.1}, "use for example power=0.8"),
        ({"eps": 0.1, "power": 0.8}, "use power=1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("specattn", **options)


@pytest.mark.parametrize("wrapper", ["twilight", "vattention"])
def test_a_list_with_weights_cannot_be_wrapped(wrapper):
    with pytest.raises(UsageError, match="returns no plain lists"):
        parse_method(f"{wrapper}:base=(specattn:rate=0.2)")
