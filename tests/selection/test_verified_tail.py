"""Verified mode: an output is off by more than eps in at most delta of the cases, whatever the draft believes.

The draft's belief is the truth blurred, nothing at all, the truth's inverse, or noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from promise import CHANNELS, HEADS, LAYERS, TOKENS, inputs, surely_above, surely_below
from torch import Tensor

from specattn.contiguous import ContiguousSource
from specattn.errors import UsageError
from specattn.kernels.nucleus import nucleus
from specattn.kernels.sparse_attention import sparse_attention
from specattn.selection import verified_tail
from specattn.selection.base import LayerState, RoundState, Selection
from specattn.selection.registry import get_method, parse_method
from specattn.selection.verified_tail import Promise, Residual, output_spread, verified_lists
from specattn.selection.weighted_tail import UNIT, independent, proposal

DELTA, P, SINK, WINDOW = 0.1, 0.3, 4, 4
CASES = [
    "flat",
    "lognormal",
    "power law",
    "values that cancel",
    "values against weights",
    "values with weights",
    "a few huge values",
]
DRAFTS = ["blurred", "flat", "inverse", "noise"]
ONE = torch.ones(1, 1)


def promise(eps: float, **changes) -> Promise:
    return replace(Promise(eps, DELTA, pilot=256, limit=0, seed=0), **changes)


@dataclass(frozen=True)
class Trials:
    """Rounds whose KV heads all hold the same tokens, and whose draft believes the same about them.

    Attributes:
        logits, values: ``[tokens]`` and ``[tokens, channels]``.
        belief: ``[tokens]``, the draft's logits.
        scales: ``[rows, group]``, the factors of the queries' logits.
    """

    logits: Tensor
    values: Tensor
    belief: Tensor
    scales: Tensor

    @classmethod
    def of(cls, case: str, draft: str, scales: Tensor = ONE) -> Trials:
        logits, values = inputs(case)
        noise = torch.randn(TOKENS, generator=torch.Generator().manual_seed(5))
        beliefs = {"blurred": logits + 0.5 * noise, "flat": 0 * logits, "inverse": -logits, "noise": noise}
        return cls(logits, values, beliefs[draft], scales)

    def state(self, layer: int) -> LayerState:
        rows, group = self.scales.shape
        keys, queries = torch.zeros(TOKENS, CHANNELS), torch.zeros(1, rows, HEADS * group, CHANNELS)
        keys[:, 0], queries[..., 0] = self.logits, self.scales.repeat(1, HEADS)
        tokens = (each.float().expand(1, HEADS, -1, -1) for each in (keys, self.values))
        starts = torch.tensor([TOKENS - rows], dtype=torch.int32)
        info = RoundState(starts, rows, TOKENS, LAYERS, HEADS, HEADS * group)
        source = ContiguousSource.of(layer, *tokens, None)
        return LayerState(info, self.residual(rows), layer, queries, 1.0, source)

    def residual(self, rows: int) -> Residual:
        belief, forced = self.belief.softmax(-1), {"sink": SINK, "recent": WINDOW + rows}
        exact = nucleus(belief[None], P, torch.tensor([TOKENS]), **forced)[0]
        shape = (1, LAYERS, HEADS, TOKENS)
        return Residual(exact.expand(shape), proposal(belief, ~exact, 0.2).expand(shape))

    def lists(self, promise: Promise, layer: int) -> tuple[LayerState, Selection]:
        state = self.state(layer)
        return state, verified_lists(state, self.residual(state.round.rows), promise)

    def failures(self, promise: Promise) -> tuple[Tensor, float]:
        """How many outputs are further off than they may be, ``[rows, group]``, and the share of tokens read."""
        failed, read = torch.zeros(self.scales.shape, dtype=torch.int64), 0.0
        exact = self.exact()
        for layer in range(LAYERS):
            state, lists = self.lists(promise, layer)
            listed = state.source.gather(layer, lists.indices)
            positions = state.round.starts[:, None] + torch.arange(state.round.rows)
            out = sparse_attention(state.queries, *listed, lists, positions, 1.0)[0].double()
            errors = (out.unflatten(1, (HEADS, -1)).transpose(0, 1) - exact).norm(dim=-1)
            failed += (errors > promise.eps * exact.norm(dim=-1)).sum(0)
            read += float(lists.counts.double().mean()) / TOKENS / LAYERS
        return failed, read

    def exact(self) -> Tensor:
        """``[rows, group, channels]``."""
        rows = len(self.scales)
        token, row = torch.arange(TOKENS), torch.arange(rows)[:, None, None]
        logits = self.scales[..., None].double() * self.logits
        hidden = token > TOKENS - rows + row
        return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ self.values.double()


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_output_fails_in_fewer_than_delta_of_the_cases(draft, eps):
    reads = []
    for case in CASES:
        failed, read = Trials.of(case, draft).failures(promise(eps))
        assert surely_below(int(failed), DELTA), case
        reads.append(read)
    sampled = sum(read < 0.95 for read in reads)
    assert sampled >= {0.05: 1, 0.1: 2, 0.2: 4}[eps], "the promise is not kept by reading everything"


def test_a_draft_that_is_right_saves_reads():
    read = {draft: Trials.of("power law", draft).failures(promise(0.2))[1] for draft in DRAFTS}
    assert read["blurred"] < 0.7 * read["flat"] < read["inverse"]


@pytest.mark.parametrize("draft", ["blurred", "inverse"])
def test_every_row_and_every_head_of_a_group_is_promised_the_same(draft):
    """One query needs many more draws than the others, whose attention is flat."""
    scales = torch.tensor([[0.0, 0.1], [0.0, 1.0], [0.2, 0.0]])
    failed, read = Trials.of("values against weights", draft, scales).failures(promise(0.2))
    assert failed.shape == scales.shape and read < 0.95
    assert all(surely_below(count, DELTA) for count in failed.flatten().tolist())


# What would break it


def broken(monkeypatch, name: str, function: Callable) -> None:
    monkeypatch.setattr(verified_tail, name, function)


def test_a_budget_from_the_denominator_alone_breaks_the_promise(monkeypatch):
    def denominator(state, exact, pilot, weights, promise):
        """With equal values nothing but the denominator's part is left."""
        keys = state.source.gather(state.layer, torch.arange(TOKENS).expand(1, HEADS, -1))[0]
        source = ContiguousSource.of(state.layer, keys, torch.ones_like(keys), None)
        return output_spread(replace(state, source=source), exact, pilot, weights, promise) / promise.eps

    trials = Trials.of("values that cancel", "blurred")
    assert surely_below(int(trials.failures(promise(0.2))[0]), DELTA)
    broken(monkeypatch, "output_spread", denominator)
    assert surely_above(int(trials.failures(promise(0.2))[0]), DELTA)


def test_a_list_without_its_weights_breaks_the_promise(monkeypatch):
    trials = Trials.of("values against weights", "blurred")
    assert surely_below(int(trials.failures(promise(0.2))[0]), DELTA)
    original = verified_tail.weighted_list

    def unweighted(*arguments):
        lists = original(*arguments)
        return replace(lists, log_weights=torch.zeros_like(lists.log_weights))

    broken(monkeypatch, "weighted_list", unweighted)
    assert surely_above(int(trials.failures(promise(0.2))[0]), 0.9)


def test_a_token_that_neither_the_draft_nor_the_pilot_has_seen_is_not_covered():
    """The limit of the promise: one token with a third of the weight and another value than all others."""
    trials = Trials.of("flat", "flat")
    trials.logits[TOKENS // 2], trials.values[TOKENS // 2] = 6.4, -8.0
    trials.logits[-1] = 0.0
    blind, read = trials.failures(promise(0.2, pilot=32))
    assert surely_above(int(blind), DELTA) and read < 0.95
    trials.belief[TOKENS // 2] = 9.0
    assert surely_below(int(trials.failures(promise(0.2, pilot=32))[0]), DELTA)


# The parts


def test_the_spread_is_that_of_the_terms_in_a_loop():
    trials = Trials.of("lognormal", "blurred")
    state, residual = trials.state(0), trials.residual(1)
    exact, weights = residual.exact[:, 0], residual.weights[:, 0]
    shifts = torch.full((1, HEADS, 40), UNIT // 3)
    pilot, _ = independent(40 * weights, shifts)
    found = output_spread(state, exact, pilot, weights, promise(0.1, delta=0.03))[0, 0, 0, 0]
    w, v = (trials.logits.double() - trials.logits.max()).exp(), trials.values.double()
    g = weights[0, 0]
    drawn = pilot[0, 0].tolist()
    heavy = exact[0, 0].nonzero().flatten().tolist()
    denominator = sum(w[t] for t in heavy) + sum(w[t] / g[t] for t in drawn) / 40
    output = (sum(w[t] * v[t] for t in heavy) + sum(w[t] * v[t] / g[t] for t in drawn) / 40) / denominator
    terms = torch.stack([w[t] * (v[t] - output) / g[t] for t in drawn])
    squares = terms.square().sum(-1)
    quantile = 2.3263  # one in a hundred
    upper = squares.mean() + quantile * squares.std() / 40**0.5 - terms.mean(0).square().sum()
    trace = upper * 40 / 39
    length = output.square().sum() - trace / denominator**2 / 40
    ratios = torch.stack([w[t] / g[t] for t in drawn])
    off = (ratios - ratios.mean()).square()
    variance = off.mean() + quantile * off.std() / 40**0.5
    expected = (trace / length).sqrt() / denominator + 0.1 * variance.sqrt() / denominator
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_independent_draws_meet_the_probabilities_and_each_unit_has_one():
    generator = torch.Generator().manual_seed(3)
    probability = torch.rand(30, generator=generator, dtype=torch.float64)
    probability *= 9 / probability.sum()
    shifts = torch.randint(UNIT, (4000, 9), generator=generator)
    tokens, given = independent(probability.expand(4000, -1), shifts)
    assert (tokens.diff(dim=-1) >= 0).all()
    times = torch.zeros(4000, 31).scatter_add_(-1, tokens, torch.ones(4000, 9))[:, :30]
    error = times.std(0) / 4000**0.5
    assert ((times.mean(0) - probability).abs() < 4.5 * error).all()
    ends = (given[0].cumsum(-1) * UNIT).long()
    for unit, token in enumerate(tokens[0].tolist()):
        place = unit * UNIT + int(shifts[0, unit])
        assert token == sum(int(end) <= place for end in ends)


def test_a_limit_cuts_the_tail_short_and_says_so():
    trials = Trials.of("lognormal", "flat")
    state, free = trials.lists(promise(0.2), 0)
    _, limited = trials.lists(promise(0.2, limit=40), 0)
    _, share = trials.lists(promise(0.2, limit=0.04), 0)
    heavy = int(trials.residual(1).exact[0, 0, 0].sum())
    assert not free.capped.any() and limited.capped.all() and share.capped.all()
    assert (limited.counts <= heavy + 40).all() and (share.counts <= heavy + 48).all()
    assert (free.counts > heavy + 100).all()
    assert isinstance(state.prepared, Residual)


def test_the_pilot_is_paid_for_where_it_was_not_drawn_again():
    trials = Trials.of("values against weights", "blurred")
    state, lists = trials.lists(promise(0.2), 0)
    residual = trials.residual(1)
    shifts = verified_tail._shifts(state, promise(0.2), 256, verified_tail.Stream.PILOT)
    pilot, _ = independent(256 * residual.weights[:, 0], shifts)
    unread = sum(
        len(set(pilot[0, head].tolist()) - set(lists.indices[0, head].tolist()) - {TOKENS})
        for head in range(HEADS)
    )
    assert lists.extra_bytes.tolist() == [unread * 2 * CHANNELS * 4] and unread > HEADS


@pytest.mark.parametrize(
    "options,message",
    [
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": 1}, "eps=1 is outside"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": 0.1, "delta": 0}, "delta=0 is outside"),
        ({"eps": 0.1, "delta": 0.6}, r"outside \(0, 0.5\]"),
        ({"eps": 0.1, "pilot": 8}, "pilot=8 is below 32"),
        ({"eps": 0.1, "tail": -1}, "tail=-1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        get_method("specattn", **options)


@pytest.mark.parametrize("method", ["quest:eps=0.1", "streaming:budget=0.1:eps=0.1", "oracle:delta=0.1"])
def test_a_method_that_cannot_sample_says_which_can(method):
    with pytest.raises(UsageError, match="an option of specattn, specattn-paper, vattention"):
        parse_method(method)


@pytest.mark.parametrize("wrapper", ["twilight", "vattention"])
def test_a_verified_list_cannot_be_wrapped(wrapper):
    with pytest.raises(UsageError, match="returns no plain lists"):
        parse_method(f"{wrapper}:base=(specattn:eps=0.1)")
