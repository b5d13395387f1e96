"""Warping against Hugging Face's processors; random numbers and samples against their distributions."""

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specattn.errors import UsageError
from specattn.sampling import SamplingParams, SamplingState, Stream, sample, uniform, warp

SIGNIFICANCE = 1e-4
VOCABULARY = 61


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test of counts against expected counts."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    freedom = torch.tensor(expected.numel() - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def hugging_face(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities of rows ``[rows, vocabulary]`` as ``generate`` makes them."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1)


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 4, VOCABULARY) * 3


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.6),
    SamplingParams(temperature=2.0, top_k=VOCABULARY + 9, top_p=0.05),
    SamplingParams(temperature=0.2, top_k=1),
]


@pytest.mark.parametrize("params", SETTINGS)
def test_warp_equals_hugging_face(logits: Tensor, params: SamplingParams) -> None:
    probs = warp(logits, SamplingState.of([params] * 6))
    expected = torch.stack([hugging_face(rows, params) for rows in logits])
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected)


def test_a_mixed_batch_equals_its_requests_alone(logits: Tensor) -> None:
    settings = [SamplingParams(), *SETTINGS[:5]]
    together = warp(logits, SamplingState.of(settings))
    for row, params in enumerate(settings):
        alone = warp(logits[row : row + 1], SamplingState.of([params]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-6, atol=0)


def test_greedy_is_one_hot_at_the_first_argmax(logits: Tensor) -> None:
    logits[0, 0, 7] = logits[0, 0, 3] = 100.0
    for others in ([SamplingParams()] * 6, [SamplingParams(top_k=2, top_p=0.1), *SETTINGS[:5]]):
        row = warp(logits, SamplingState.of(others))[0]
        assert torch.equal(row.argmax(-1), logits[0].argmax(-1)) and row[0].argmax() == 3
        assert torch.equal(row.sum(-1), torch.ones(4)) and row.max() == 1 and (row > 0).sum() == 4


def test_a_tiny_temperature_is_greedy_and_finite(logits: Tensor) -> None:
    logits[0, 0, 3] = 3e38
    probs = warp(logits, SamplingState.of([SamplingParams(temperature=1e-30)] * 6))
    assert torch.equal(probs, warp(logits, SamplingState.of([SamplingParams()] * 6)))


def test_masked_logits_have_no_probability() -> None:
    logits = torch.tensor([[[0.0, -float("inf"), 1.0, -float("inf")]]])
    probs = warp(logits, SamplingState.of([SamplingParams(temperature=1.0, top_k=3, top_p=0.999)]))
    torch.testing.assert_close(probs[0, 0], logits[0, 0].softmax(-1))


def test_half_precision_logits_give_float32(logits: Tensor) -> None:
    half = logits.bfloat16()
    for params in (SamplingParams(), SETTINGS[3]):
        state = SamplingState.of([params] * 6)
        assert warp(half, state).dtype == torch.float32
        assert torch.equal(warp(half, state), warp(half.float(), state))


def test_idle_steps_are_known_to_the_host() -> None:
    greedy = SamplingParams(top_k=50, top_p=0.5)
    state = SamplingState.of([greedy, SamplingParams(temperature=1.0)])
    assert (state.sampled, state.max_top_k, state.uses_top_p) == (True, 0, False)
    assert not SamplingState.of([greedy]).sampled
    state = SamplingState.of([*SETTINGS[1:3], greedy])
    assert (state.max_top_k, state.uses_top_p) == (5, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, float("nan"))),
        ("top_k", -1),
        *(("seed", value) for value in (2**63, -(2**63) - 1)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} = "):
        SamplingParams(**{name: value})


# Random numbers

COUNT = 100_000


def splitmix(seed: int, stream: int, counter: int) -> float:
    """The same hash in Python's integers."""
    state = seed
    for value in (stream, counter):
        z = (state + (value + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return (state >> 40) / 2**24


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("stream", list(Stream))
def test_uniform_is_the_hash_that_it_says(seed: int, stream: Stream) -> None:
    counters = [0, 1, 2, 1000, 2**40, 2**63 - 1]
    got = uniform(torch.tensor([seed]), torch.tensor([counters]), stream)
    assert got.dtype == torch.float32
    assert got[0].tolist() == [splitmix(seed, stream, counter) for counter in counters]


def draws(axis: str) -> Tensor:
    """Numbers that follow each other in one argument, the others held."""
    steps, zero = torch.arange(COUNT), torch.zeros(1, dtype=torch.int64)
    if axis == "counter":
        return uniform(zero + 7, steps[None])[0]
    if axis == "seed":
        return uniform(steps, zero.expand(COUNT) + 7)
    return torch.stack(
        [uniform(steps[:1000], zero.expand(1000), stream) for stream in range(100)], 1
    ).flatten()


@pytest.mark.parametrize("axis", ["counter", "seed", "stream"])
def test_uniform_is_uniform(axis: str) -> None:
    u = draws(axis)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 256, 0, 1)
    assert p_value(counts, torch.full((256,), COUNT / 256)) > SIGNIFICANCE
    grid = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    distance = (u.double().sort().values - grid).abs().max()
    assert distance < 2.23 / COUNT**0.5  # Kolmogorov-Smirnov at the same significance


@pytest.mark.parametrize("axis", ["counter", "seed", "stream"])
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_neighbours_are_independent(axis: str, lag: int) -> None:
    cell = (draws(axis) * 16).long()
    pairs = cell[:-lag] * 16 + cell[lag:]
    counts = torch.bincount(pairs, minlength=256)
    assert p_value(counts, torch.full((256,), pairs.numel() / 256)) > SIGNIFICANCE


@pytest.mark.parametrize("bit", range(24))
def test_each_bit_is_fair_and_changes_with_the_counter(bit: int) -> None:
    bits = (draws("counter") * 2.0 ** (bit + 1)).long() & 1
    same = (bits[1:] == bits[:-1]).double().mean()
    assert abs(bits.double().mean() - 0.5) < 2 / COUNT**0.5
    assert abs(same - 0.5) < 2 / COUNT**0.5


def test_uniform_does_not_depend_on_the_batch() -> None:
    seeds, counters = torch.tensor([3, 3, 9]), torch.tensor([[0, 5], [5, 0], [0, 5]])
    u = uniform(seeds, counters, Stream.ACCEPT)
    assert torch.equal(u[0], u[1].flip(0)) and not torch.equal(u[0], u[2])
    assert torch.equal(u[2:], uniform(seeds[2:], counters[2:], Stream.ACCEPT))
    assert torch.equal(u[:, 0], uniform(seeds, counters[:, 0], Stream.ACCEPT))
    assert not torch.equal(u, uniform(seeds, counters, Stream.NEXT))


# Sampling


def test_sample_follows_the_distribution() -> None:
    probs = torch.tensor([0.35, 1e-3, 0.2, 0.0, 0.05, 0.3, 0.099, 0.0])
    u = uniform(torch.tensor([1]), torch.arange(COUNT)[None])[0]
    counts = torch.bincount(sample(probs.expand(COUNT, 8), u), minlength=8)
    assert counts[probs == 0].sum() == 0
    assert p_value(counts[probs > 0], probs[probs > 0].double() * COUNT) > SIGNIFICANCE


@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e30])
def test_sample_is_the_inverse_of_the_cumulative_distribution(scale: float) -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]) * scale
    u = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-24])
    assert sample(probs.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_sample_never_returns_a_token_of_probability_zero() -> None:
    torch.manual_seed(0)
    probs = torch.randn(4, 3, 50_000).mul(4).softmax(-1)
    probs = torch.where(torch.rand_like(probs) < 0.7, 0, probs)
    for u in (0.0, 2**-24, 0.5, 1 - 2**-24):
        token = sample(probs, torch.full((4, 3), u))
        assert token.shape == (4, 3) and token.dtype == torch.int64
        assert (probs.gather(-1, token[..., None]) > 0).all()


def test_sample_of_a_one_hot_row_is_that_token() -> None:
    u = uniform(torch.tensor([5]), torch.arange(VOCABULARY)[None])[0]
    assert torch.equal(sample(torch.eye(VOCABULARY), u), torch.arange(VOCABULARY))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_sample_of_a_broken_row_stays_in_the_vocabulary(value: float) -> None:
    token = sample(torch.full((3, 9), value), torch.tensor([0.0, 0.5, 0.99]))
    assert (token >= 0).all() and (token < 9).all()


def test_nothing_is_asked_of_the_host() -> None:
    """Tensors of the meta device have no values: any read of one on the host raises."""
    state = SamplingState.of([SamplingParams(), *SETTINGS[1:4]], "meta")
    probs = warp(torch.rand(4, 3, 100, device="meta"), state)
    u = uniform(state.seed, torch.ones(4, 3, dtype=torch.int64, device="meta"), Stream.DRAFT)
    token = sample(probs, u)
    assert token.shape == (4, 3) and token.is_meta
