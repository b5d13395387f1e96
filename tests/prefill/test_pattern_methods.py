"""What MInference and FlexPrefill have in common: exact with full budgets, causal, honest about what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from prefill_calls import SCALING, causal_total, random_call, revealing_call

from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.flexprefill import FlexPrefill
from specattn.prefill.head_patterns import HeadPattern
from specattn.prefill.minference import MInference
from specattn.prefill.registry import parse_prefill

KINDS = {
    "a-shape": HeadPattern("a-shape", 5, 20),
    "vertical-slash": HeadPattern("vertical-slash", 8, 12),
    "block-sparse": HeadPattern("block-sparse", blocks=3),
}
SPECS = [
    "minference:vertical=6:slash=9:sink=2:window=4:block=16:last=8",
    "minference:vertical=0.05:slash=0.02:sink=1:window=1:block=8",
    "flexprefill:gamma=0.6:block=16:min_budget=16",
    "flexprefill:gamma=0.5:block=8:min_budget=0:tau=0",
    "flexprefill:gamma=0.5:block=8:min_budget=0:tau=2",
]
SHAPES = [(151, 0, 6, 1), (90, 37, 3, 3), (64, 128, 6, 2), (33, 50, 8, 1), (1, 140, 2, 2)]


class Mixed(MInference):
    """All three patterns among the heads of a layer."""

    def heads(self, call: PrefillCall) -> list[HeadPattern]:
        return [list(KINDS.values())[head % 3] for head in range(call.query.shape[1])]


class AShape(MInference):
    """The one pattern that is the same for every text."""

    def heads(self, call: PrefillCall) -> list[HeadPattern]:
        return [KINDS["a-shape"]] * call.query.shape[1]


SMALL = {"block": 16, "sink": 2, "window": 4, "last": 8}


def methods() -> list[PrefillMethod]:
    return [*map(parse_prefill, SPECS), Mixed(**SMALL)]


def dense(call: PrefillCall) -> torch.Tensor:
    return dense_attention(call.query, [(call.key, call.value)], call.start, 0, call.scaling)


@pytest.mark.parametrize("group", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,start", [(147, 0), (75, 64), (61, 101)])
def test_full_budgets_are_dense_attention(group: int, rows: int, start: int) -> None:
    torch.manual_seed(group)
    call, length = random_call(rows, start, 2 * group, 2), rows + start
    # All but the furthest distance, and nearly all of the mass: everything, and yet not by the dense path.
    for spec in (
        f"minference:vertical=9:slash={length - 1}:block=16",
        "flexprefill:gamma=0.9999999999:block=16:min_budget=16",
        "flexprefill:gamma=0.9999999999:block=16:min_budget=16:tau=2",
    ):
        output = parse_prefill(spec).attention(call)
        assert output.computed > 1, spec  # nothing was saved, and the estimation came on top
        assert error_ratio(output.out, dense(call)) < 1e-5, spec


@pytest.mark.parametrize(
    "spec",
    [
        "minference:slash=1",
        "minference:vertical=500",
        "minference:ratio=20",
        "flexprefill",
        "flexprefill:gamma=1",
    ],
)
def test_what_covers_everything_is_not_estimated(spec: str) -> None:
    torch.manual_seed(0)
    call = random_call(400, 40, 4, 2)
    output = parse_prefill(spec).attention(call)
    assert torch.equal(output.out, dense(call))
    assert output.computed == 1


@pytest.mark.parametrize("rows,start,query_heads,kv_heads", SHAPES)
def test_every_row_sees_itself_and_no_future(rows: int, start: int, query_heads: int, kv_heads: int) -> None:
    torch.manual_seed(rows)
    call = revealing_call(rows, start, query_heads, kv_heads)
    positions = torch.arange(start, start + rows)
    future = torch.arange(start + rows) > positions[:, None]
    for method in methods():
        weights = method.attention(call).out
        assert (weights.transpose(1, 2)[future] == 0).all(), method
        assert (weights[torch.arange(rows), :, positions] > 0).all(), method
        assert (weights.sum(-1) - 1).abs().max() < 1e-5, method


@pytest.mark.parametrize("rows,start,query_heads,kv_heads", SHAPES)
def test_what_is_kept_has_its_exact_weights(rows: int, start: int, query_heads: int, kv_heads: int) -> None:
    torch.manual_seed(rows)
    call = revealing_call(rows, start, query_heads, kv_heads)
    exact = dense(call)
    for method in methods():
        weights = method.attention(call).out
        kept = torch.where(weights > 0, exact, 0)
        assert error_ratio(weights, kept / kept.sum(-1, keepdim=True)) < 1e-5, method


@pytest.mark.parametrize("rows,start,query_heads,kv_heads", SHAPES)
def test_computed_counts_the_products_and_the_estimation(
    rows: int, start: int, query_heads: int, kv_heads: int
) -> None:
    torch.manual_seed(rows)
    call = revealing_call(rows, start, query_heads, kv_heads)
    for method in methods():
        output = method.attention(call)
        products = int((output.out > 0).sum()) + estimation(method, call)
        assert output.computed == pytest.approx(products / causal_total(call)), method


def estimation(method: PrefillMethod, call: PrefillCall) -> int:
    """Products of the last queries, and of pooled blocks."""
    rows, heads, _ = call.query.shape
    length = call.start + rows

    def last(count: int) -> int:
        return sum(call.start + row + 1 for row in range(max(0, rows - count), rows))

    assert isinstance(method, MInference | FlexPrefill)
    query_blocks, key_blocks = -(-rows // method.block), -(-length // method.block)
    if isinstance(method, FlexPrefill):
        return heads * (last(method.block) + key_blocks + query_blocks * key_blocks)
    costs = {"a-shape": 0, "vertical-slash": last(method.last), "block-sparse": query_blocks * key_blocks}
    return sum(costs[head.kind] for head in method.heads(call))


def test_future_values_never_change_a_row() -> None:
    torch.manual_seed(5)
    call = random_call(120, 20, 6, 2)
    value = call.value.clone()
    value[80:] = 1e6
    for method in methods():
        before, after = (method.attention(replace(call, value=each)).out for each in (call.value, value))
        assert torch.equal(before[:60], after[:60]), method
        assert not torch.equal(before[60:], after[60:]), method


def test_no_future_token_changes_a_row_where_the_pattern_is_fixed_or_everything_is_read() -> None:
    torch.manual_seed(6)
    call, other = random_call(120, 20, 6, 2), random_call(120, 20, 6, 2)
    query, key, value = call.query.clone(), call.key.clone(), call.value.clone()
    query[70:], key[90:], value[90:] = other.query[70:], other.key[90:], other.value[90:]
    changed = PrefillCall(0, query, key, value, 20, SCALING)
    full = parse_prefill("minference:vertical=9:slash=139:block=16")
    for method in (
        AShape(**SMALL),
        full,
        parse_prefill("flexprefill:gamma=0.9999999999:block=16:min_budget=16"),
    ):
        before, after = method.attention(call).out, method.attention(changed).out
        assert error_ratio(after[:70], before[:70]) < 1e-6, method
        assert error_ratio(after[70:], before[70:]) > 0.1, method


def test_chunks_of_a_fixed_pattern_are_the_whole() -> None:
    torch.manual_seed(8)
    call = random_call(160, 0, 6, 2)
    method = AShape(**SMALL)
    parts = [
        method.attention(
            replace(call, query=call.query[a:b], key=call.key[:b], value=call.value[:b], start=a)
        ).out
        for a, b in ((0, 48), (48, 112), (112, 160))
    ]
    assert error_ratio(torch.cat(parts), method.attention(call).out) < 1e-6


def test_bfloat16_in_bfloat16_out() -> None:
    torch.manual_seed(9)
    call = random_call(100, 10, 4, 2)
    rounded = PrefillCall(0, call.query.bfloat16(), call.key.bfloat16(), call.value.bfloat16(), 10, SCALING)
    for method in methods():
        output: PrefillOutput = method.attention(rounded)
        assert output.out.dtype == torch.bfloat16, method
        assert output.out.isfinite().all(), method
        assert output.computed.dim() == 0, method
