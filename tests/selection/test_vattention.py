"""vAttention against a loop-style reading of its equations, in the engine, and what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import ClassVar

import pytest
import torch
from paged import SCALING, PagedRound, paged_round
from tiny import tiny_mapping, tiny_model, tiny_pair, tiny_tokenizer
from torch import Tensor

from specattn.dropin import sparse_attention as dropin
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.kernels.sparse_attention import sparse_attention
from specattn.pairs import Pair
from specattn.sampling import Stream
from specattn.selection.base import LayerState, Method, Need, Selection
from specattn.selection.random import layer_weights
from specattn.selection.registry import get_method, parse_method
from specattn.selection.streaming import Streaming
from specattn.selection.vattention import VAttention
from specattn.stores.page_bounds import PageBounds

GEOMETRY = KVGeometry(layers=3, query_heads=6, kv_heads=2, head_dim=8, dtype=torch.float32)
LENGTHS, ROWS, LAYER = [70, 161, 38], 3, 2
HEAVY = "base=(topk:budget=0.05):sink=3:window=0.02:least=5:sample=0.1"


def a_round(lengths: list[int] = LENGTHS) -> PagedRound:
    """A round whose values have a mean, so that their weighted sum does not all but vanish."""
    paged = paged_round(GEOMETRY, lengths, ROWS, seed=3)
    for values in paged.step.cache.values:
        values += 1.5
    return paged


def select(text: str, lengths: list[int] = LENGTHS) -> tuple[Selection, LayerState]:
    method = parse_method(text)
    state = a_round(lengths).layer(method, LAYER)
    return method.select(state), state


def weighted(selection: Selection, request: int, head: int) -> dict[int, float]:
    """The tokens of a list with their log-weights."""
    count = int(selection.counts[request, head])
    assert selection.log_weights is not None
    tokens, weights = selection.indices[request, head], selection.log_weights[request, head]
    return dict(zip(tokens[:count].tolist(), weights[:count].tolist(), strict=True))


# Against the equations


@dataclass(frozen=True)
class ByHand:
    """One list, worked out token by token in float64."""

    method: VAttention
    state: LayerState
    request: int
    head: int

    @cached_property
    def exact(self) -> set[int]:
        start = LENGTHS[self.request]
        method = self.method
        base = method.base.select(replace(self.state, prepared=method.base.prepare(self.state.round)))
        tokens = base.indices[self.request, self.head, : int(base.counts[self.request, self.head])].tolist()
        sink, window = (
            extent if extent >= 1 else math.ceil(extent * start) for extent in (method.sink, method.window)
        )
        return {*tokens, *range(int(sink)), *range(start - int(window), start + ROWS)}

    @cached_property
    def residual(self) -> list[int]:
        exact = self.exact
        return [token for token in range(LENGTHS[self.request] + ROWS) if token not in exact]

    def numbers(self, stream: Stream) -> list[float]:
        info = self.state.round
        return layer_weights(info, LAYER, self.method.seed, stream)[self.request, self.head].tolist()

    def lowest(self, stream: Stream, count: int) -> list[int]:
        """A sample without replacement: the tokens with the smallest numbers."""
        numbers = self.numbers(stream)
        return sorted(self.residual, key=lambda token: (numbers[token], -token))[:count]

    @cached_property
    def pilot(self) -> list[int]:
        n = len(self.residual)
        return self.lowest(Stream.PILOT, min(n, max(self.method.least, math.ceil(self.method.sample * n))))

    def needed(self, query: Tensor, position: int) -> float:
        """Draws with replacement for one query."""
        method, n = self.method, len(self.residual)
        everything = torch.arange(LENGTHS[self.request] + ROWS).expand(len(LENGTHS), 2, -1)
        keys, values = (
            t[self.request, self.head].double() for t in self.state.source.gather(LAYER, everything)
        )
        weight = (keys @ query.double() * SCALING).exp()
        exact = [token for token in self.exact if token <= position]
        pilot = self.pilot
        w, wv = weight[pilot], weight[pilot, None] * values[pilot]
        d = weight[exact].sum() + n * w.mean()
        vector = (weight[exact, None] * values[exact]).sum(0) + n * wv.mean(0)
        trace = wv.var(0).sum()
        m = len(pilot)
        squared_length = vector @ vector - n**2 * trace / m * (1 - m / n)
        spread_n = float(n * trace.sqrt() / squared_length.clamp(min=0).sqrt())
        spread_d = float(n * w.std() / d)
        eps, delta = method.eps, method.delta
        z = NormalDist().inv_cdf
        if method.verify == "denominator":
            return (z(1 - delta / 2) * spread_d / eps) ** 2
        if method.verify == "numerator":
            return (z(1 - delta / 2) * spread_n / eps) ** 2
        tolerance_d = eps * spread_d / (spread_n + (1 + eps) * spread_d)
        tolerance_n = eps - (1 + eps) * tolerance_d
        return max(
            (z(1 - delta / 4) * spread / tolerance) ** 2
            for spread, tolerance in ((spread_n, tolerance_n), (spread_d, tolerance_d))
        )

    @cached_property
    def count(self) -> int:
        group = GEOMETRY.group
        n = len(self.residual)
        draws = max(
            self.needed(
                self.state.queries[self.request, row, self.head * group + i], LENGTHS[self.request] + row
            )
            for row in range(ROWS)
            for i in range(group)
        )
        if not self.method.replacement:
            draws = 1 / (1 / draws + 1 / n)
        return min(n, max(self.method.least, math.ceil(draws)))

    @cached_property
    def times(self) -> dict[int, int]:
        residual, count = self.residual, self.count
        if not self.method.replacement or count == len(residual):
            return dict.fromkeys(self.lowest(Stream.RESIDUAL, count), 1)
        numbers = self.numbers(Stream.RESIDUAL)[:count]
        return Counter(residual[int(number * len(residual))] for number in numbers)

    @cached_property
    def log_weights(self) -> dict[int, float]:
        scale = len(self.residual) / self.count
        sampled = {token: math.log(times * scale) for token, times in self.times.items()}
        return {**dict.fromkeys(self.exact, 0.0), **sampled}


OPTIONS = [
    f"vattention:{HEAVY}:eps=0.5:delta=0.3",
    f"vattention:{HEAVY}:eps=0.8:delta=0.3:replacement=true:seed=5",
    f"vattention:{HEAVY}:eps=0.2:delta=0.2:verify=denominator:sample=0.3",
    f"vattention:{HEAVY}:eps=0.4:delta=0.2:verify=numerator:replacement=true",
    "vattention:base=(streaming:budget=9:sink=2):sink=0:window=20:least=4:eps=0.7:delta=0.6",
]


@pytest.mark.parametrize("text", OPTIONS)
def test_lists_weights_and_reads_are_those_of_the_equations(text):
    selection, state = select(text)
    method = parse_method(text)
    assert isinstance(method, VAttention)
    shares = []
    for request in range(len(LENGTHS)):
        unused = 0
        for head in range(GEOMETRY.kv_heads):
            hand = ByHand(method, state, request, head)
            expected = hand.log_weights
            assert list(weighted(selection, request, head)) == sorted(expected)
            assert weighted(selection, request, head) == pytest.approx(expected, abs=1e-5)
            unused += len(set(hand.pilot) - set(expected))
            shares.append(hand.count / len(hand.residual))
        assert isinstance(selection.extra_bytes, Tensor)
        assert selection.extra_bytes[request] == unused * GEOMETRY.row_bytes
    assert min(shares) < 0.8 and len(set(shares)) > 3, "budgets are neither everything nor all the same"


@pytest.mark.parametrize("replacement", [False, True])
def test_sampled_weights_add_up_to_the_residual_and_heavy_ones_weigh_one(replacement):
    text = f"vattention:{HEAVY}:eps=0.8:delta=0.6:replacement={replacement}"
    selection, state = select(text)
    method = parse_method(text)
    assert isinstance(method, VAttention)
    for request in range(len(LENGTHS)):
        for head in range(GEOMETRY.kv_heads):
            hand = ByHand(method, state, request, head)
            weights, exact = weighted(selection, request, head), hand.exact
            assert {token for token, weight in weights.items() if weight == 0} >= exact
            total = sum(math.exp(weight) for token, weight in weights.items() if token not in exact)
            assert total == pytest.approx(len(hand.residual), rel=1e-5)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_tolerance_of_nothing_is_dense_attention(replacement):
    selection, state = select(f"vattention:eps=1e-9:sink=4:window=4:least=4:replacement={replacement}")
    info, paged = state.round, a_round()
    assert torch.equal(selection.counts, info.lengths[:, None].expand(-1, GEOMETRY.kv_heads))
    assert selection.log_weights is not None and not selection.log_weights.any()
    assert not torch.as_tensor(selection.extra_bytes).any(), "what was read for the pilot is read only once"
    positions = info.starts[:, None] + torch.arange(ROWS)
    keys, values = state.source.gather(LAYER, selection.indices)
    out = sparse_attention(state.queries, keys, values, selection, positions, SCALING)
    for request, start in enumerate(LENGTHS):
        segments, _ = paged.step.segments(LAYER, request, None)
        assert (
            error_ratio(out[request], dense_attention(state.queries[request], segments, start, 0, SCALING))
            < 1e-5
        )


def test_nothing_is_left_to_sample_where_the_heavy_tokens_are_all_there_are():
    selection, state = select("vattention:sink=150:window=20")
    assert torch.equal(selection.counts, state.round.lengths[:, None].expand(-1, GEOMETRY.kv_heads))
    assert selection.log_weights is not None and not selection.log_weights.any()


@pytest.mark.parametrize("text", OPTIONS)
def test_a_request_is_sampled_alike_in_any_batch(text):
    together, _ = select(text)
    for request, length in enumerate(LENGTHS):
        alone, _ = select(text, [length])
        for head in range(GEOMETRY.kv_heads):
            assert weighted(together, request, head) == weighted(alone, 0, head)


def test_samples_differ_between_seeds_heads_layers_and_rounds():
    def sampled(text: str, length: int = 161, layer: int = LAYER) -> list[tuple[int, ...]]:
        loose = "eps=0.9:delta=0.9:verify=denominator"
        method = parse_method(f"vattention:base=(streaming:budget=4:sink=2):{loose}:{text}")
        selection = method.select(a_round([length]).layer(method, layer))
        return [tuple(weighted(selection, 0, head)) for head in range(GEOMETRY.kv_heads)]

    small = "sink=0:window=0:least=20"
    lists = [
        *sampled(f"{small}:seed=0"),
        *sampled(f"{small}:seed=1"),
        *sampled(small, layer=1),
        *sampled(small, length=160),
    ]
    assert len(set(lists)) == len(lists) == 8
    assert sampled(small) == lists[:2]


# What the base asks for


@dataclass(frozen=True)
class Watched(Streaming):
    """Needs everything, and reads something of its own."""

    name: ClassVar[str] = "watched"

    @property
    def needs(self) -> Need:
        return Need.DRAFT | Need.MAPPING

    @property
    def stores(self) -> tuple[PageBounds, ...]:
        return (PageBounds(8),)

    def draft_heads(self, mapping: object) -> Tensor:
        return torch.tensor([1, 2])

    def select(self, state: LayerState) -> Selection:
        return replace(super().select(state), extra_bytes=1000.0)


def test_the_base_gets_what_it_asks_for_and_its_reads_count():
    base = Watched(budget=8, sink=2)
    method = VAttention(base=base, sink=1, window=1, least=5, eps=0.9, delta=0.9)
    assert method.needs == base.needs and method.stores == base.stores
    assert torch.equal(method.draft_heads(None), base.draft_heads(None))
    state = a_round().layer(method, LAYER)
    plain = replace(method, base=Streaming(budget=8, sink=2)).select(state)
    watched = method.select(state)
    assert torch.equal(watched.indices, plain.indices)
    assert torch.equal(torch.as_tensor(watched.extra_bytes), torch.as_tensor(plain.extra_bytes) + 1000)


def test_names_defaults_and_text():
    method = get_method("vattention")
    assert isinstance(method, VAttention)
    assert (method.eps, method.delta, method.sink, method.window, method.sample) == (
        0.05,
        0.05,
        128,
        128,
        0.01,
    )
    assert method.base == get_method("topk", budget=0.02, sink=0, window=0)
    assert not method.selects and [method.is_dense(layer) for layer in range(3)] == [True, True, False]
    assert parse_method("vattention:base=topk") == method, "a base without options gets the paper's"
    assert parse_method("vattention:base=quest").stores == (PageBounds(16),)
    assert parse_method("vattention:base=specattn").needs == Need.DRAFT | Need.MAPPING
    text = parse_method("vattention:base=(topk:budget=0.2):eps=0.1").spec()
    assert text == "vattention:base=(topk:budget=0.2:sink=0:window=0):eps=0.1"
    assert parse_method(text).spec() == text


@pytest.mark.parametrize(
    "text,message",
    [
        ("eps=0", r"eps=0.0 is outside \(0, 1\)"),
        ("eps=1", r"eps=1.0 is outside \(0, 1\)"),
        ("eps=nan", r"eps=nan is outside"),
        ("delta=0", r"delta=0.0 is outside \(0, 1\)"),
        ("delta=1", r"delta=1.0 is outside \(0, 1\)"),
        ("verify=all", "choose one of output, numerator, denominator"),
        ("sink=-1", "sink=-1.0 is neither a fraction"),
        ("window=2.5", "window=2.5 is neither a fraction"),
        ("window=inf", "window=inf is neither a fraction"),
        ("window=nan", "window=nan is neither a fraction"),
        ("sample=0", r"sample=0.0 is outside \(0, 1\]"),
        ("sample=1.5", r"sample=1.5 is outside \(0, 1\]"),
        ("least=1", "least=1 is below 2"),
        ("base=vattention", "base=vattention returns no plain lists"),
        ("base=twilight", "base=twilight returns no plain lists"),
        ("base=(topk:budget=12:sink=4:window=16)", "12 tokens, below its sink and window of 20.*sink=0"),
        ("base=(random:budget=5:sink=3:window=4)", "5 tokens, below its sink and window of 7"),
    ],
)
def test_refusals_name_the_value(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(f"vattention:{text}")


# In the engine

PROMPT = torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(2)).tolist()
RAGGED = [PROMPT[:25], PROMPT, PROMPT[3:40]]
SMALL = "sink=2:window=4:least=4:sample=0.1:delta=0.8"
METHODS = [
    f"vattention:base=(topk:budget=0.2):{SMALL}:eps=0.9",
    f"vattention:base=(quest:budget=0.2:page=4):{SMALL}:eps=0.5:verify=denominator:replacement=true",
    f"vattention:base=(specattn:p=0.5):{SMALL}:eps=0.9:verify=denominator",
]


def run(pair: Pair, prompts: list[list[int]], method: Method | str, **options):
    needs_mapping = pair.draft is not None and "specattn" in str(method)
    mapping = tiny_mapping(pair) if needs_mapping else None
    options = {"max_new_tokens": 12, "ignore_eos": True, "mapping": mapping} | options
    return generate(pair, prompts, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox"])
def test_a_batch_gives_what_each_prompt_gives_alone(method, model_type):
    pair = tiny_pair(model_type, layers=4)
    together = run(pair, RAGGED, method)
    dense = run(pair, RAGGED, "dense")
    for prompt, result in zip(RAGGED, together, strict=True):
        (alone,) = run(pair, [prompt], method)
        assert result.tokens == alone.tokens
        assert result.kv_read_fraction == pytest.approx(alone.kv_read_fraction)
        assert 0.3 < result.kv_read_fraction < 1
    assert [result.tokens for result in together] != [result.tokens for result in dense]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_tolerance_of_nothing_decodes_densely_and_reads_everything_once(model_type):
    pair = tiny_pair(model_type)
    (result,) = run(pair, [PROMPT], f"vattention:{SMALL}:eps=1e-9")
    assert result.tokens == run(pair, [PROMPT], "dense")[0].tokens
    assert result.kv_read_fraction == 1.0


@pytest.mark.parametrize("method", METHODS[:2])
def test_plain_decoding_in_the_engine_and_inside_transformers_draw_the_same(method):
    model = tiny_model("qwen2", layers=4)
    plain = Pair("plain", model, None, tiny_tokenizer())
    results = run(plain, RAGGED, method)
    assert max(result.kv_read_fraction for result in results) < 1
    for prompt, result in zip(RAGGED, results, strict=True):
        with dropin(model, method):
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert output[0, len(prompt) :].tolist() == result.tokens


def test_a_base_that_needs_a_draft_is_refused_without_one():
    model = tiny_model("qwen2")
    with pytest.raises(UsageError, match="draft"), dropin(model, METHODS[2]):
        raise AssertionError("not reached")
    with pytest.raises(UsageError, match="draft"):
        run(Pair("plain", model, None, tiny_tokenizer()), [PROMPT], METHODS[2])
