"""The draft's attention of a round in one pass: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draft_case import BOUND, DEVICE, DTYPES, NAN, SHAPES, DraftCase, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.round_scores import round_scores, round_scores_reference

SCALING = 0.21
LENGTHS = [150, 9, 0, 33]
BOTH = pytest.mark.parametrize("score", [round_scores, round_scores_reference])


def exact(case: DraftCase, request: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exps ``[rows, heads]`` and mean probabilities ``[heads, length]``, a row and head at a time."""
    key = case.clean_keys[request].double()
    rows, heads, _ = case.query.shape[1:]
    lse = torch.zeros(rows, heads, dtype=torch.float64, device=DEVICE)
    mean = torch.zeros(heads, len(key), dtype=torch.float64, device=DEVICE)
    for row in range(rows):
        seen = max(len(key) - rows + 1 + row, 0)
        for head in range(heads):
            logits = key[:seen, head // (heads // key.shape[1])] @ case.query[request, row, head].double()
            lse[row, head] = (logits * SCALING).logsumexp(0) if seen else 0
            mean[head, :seen] += (logits * SCALING).softmax(0) / rows
    return lse, mean


def run(
    case: DraftCase, score, length: int = 192, dtype: torch.dtype = torch.float32, due: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    places = case.export().places
    kv_heads, slots = case.keys.shape[1], len(case.batch.block_table)
    heads_out = torch.full(
        (len(case.lengths), int(places.max()) + 2, length), NAN, dtype=dtype, device=DEVICE
    )
    own_out = torch.full((slots, kv_heads, length), NAN, dtype=dtype, device=DEVICE)
    lse = torch.stack([exact(case, request)[0] for request in range(len(case.lengths))]).float()
    out = {"heads_out": heads_out, "own_out": own_out}
    score(case.query, case.keys, case.batch, lse, places, SCALING, **out, due=due)
    return heads_out, own_out


@BOTH
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_attention_of_the_rows(score, dtype, rows, query_heads, kv_heads, head_dim):
    case = draft_case(
        LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    heads_out, own_out = run(case, score)
    places = case.export().places
    for request, length in enumerate(LENGTHS):
        mean = exact(case, request)[1]
        own = own_out[case.batch.slots[request]]
        wanted = mean.unflatten(0, (kv_heads, -1)).mean(1)
        if length:
            assert error_ratio(own[:, :length].double(), wanted) < BOUND[dtype]
        for head in (places >= 0).nonzero().flatten().tolist():
            found = heads_out[request, places[head]]
            if length:
                assert error_ratio(found[:length].double(), mean[head]) < BOUND[dtype]
            assert not found[length : length + 32].any(), (
                "what lies behind is zero, not what was there before"
            )
        assert not own[:, length : length + 32].any()


@BOTH
def test_rows_of_infinite_sums_do_not_count(score):
    """So rows that were rejected are left out of a round's mean."""
    case = draft_case([150, 33], rows=3)
    places = case.export().places
    lse = torch.stack([exact(case, request)[0] for request in range(2)]).float()
    outs = []
    for first in (False, True):
        heads_out = torch.full((2, int(places.max()) + 2, 192), NAN, device=DEVICE)
        own_out = torch.full((len(case.batch.block_table), case.keys.shape[1], 192), NAN, device=DEVICE)
        kept = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        kept[:1] = first
        kept[1:] = not first
        sums = lse.masked_fill(~kept[:, None], float("inf"))
        score(case.query, case.keys, case.batch, sums, places, SCALING, heads_out=heads_out, own_out=own_out)
        outs.append(own_out[case.batch.slots])
    for request, length in enumerate((150, 33)):
        whole = exact(case, request)[1].unflatten(0, (case.keys.shape[1], -1)).mean(1)
        parts = sum(out[request, :, :length].double() for out in outs)
        assert error_ratio(parts, whole) < 1e-2
        assert all(out[request, :, :length].isfinite().all() and out[request].any() for out in outs)


@BOTH
def test_only_the_requests_slots_are_written(score):
    case = draft_case(LENGTHS)
    _, own_out = run(case, score)
    others = set(range(len(own_out))) - set(case.batch.slots.tolist())
    assert others and all(own_out[slot].isnan().all() for slot in others)


@BOTH
def test_rows_need_not_lie_beside_each_other(score):
    case = draft_case(LENGTHS, rows=4)
    apart = replace(case, query=case.query.transpose(0, 1).contiguous().transpose(0, 1))
    assert not apart.query.is_contiguous()
    for found, wanted in zip(run(apart, score), run(case, score), strict=True):
        assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))


@BOTH
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", [(1, 6, 3, 64), (5, 14, 2, 64), (2, 3, 1, 32)])
def test_heads_that_are_not_due_are_left_alone(score, rows, query_heads, kv_heads, head_dim):
    """Others of each request; what lies behind them is not written either."""
    case = draft_case(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    request = torch.arange(len(LENGTHS), device=DEVICE)[:, None]
    due = (request + torch.arange(kv_heads, device=DEVICE)) % 2 == 0
    # As a slice of what all layers have.
    due = torch.stack([~due, due, ~due], 1)[:, 1]
    places = case.export().places
    everything, some = run(case, score), run(case, score, due=due)
    for request, slot in enumerate(case.batch.slots.tolist()):
        for head in range(kv_heads):
            group = places.view(kv_heads, -1)[head]
            exported = group[group >= 0].long()
            pairs = [
                (some[1][slot, head], everything[1][slot, head]),
                (some[0][request, exported], everything[0][request, exported]),
            ]
            for found, wanted in pairs:
                if due[request, head]:
                    assert torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))
                else:
                    assert found.isnan().all()
    others = set(range(len(some[1]))) - set(case.batch.slots.tolist())
    assert all(some[1][slot].isnan().all() for slot in others)


def test_the_keys_of_heads_that_are_not_due_are_not_read():
    case = draft_case(LENGTHS)
    keys = case.keys.clone()
    keys[:, 1] = NAN
    due = torch.tensor([[True, False]] * len(LENGTHS), device=DEVICE)
    found = run(replace(case, keys=keys), round_scores, due=due)
    for part, wanted in zip(found, run(case, round_scores, due=due), strict=True):
        assert torch.equal(part.nan_to_num(-1), wanted.nan_to_num(-1))


@pytest.mark.parametrize(
    "due,message",
    [
        (torch.ones(4, 3, dtype=torch.bool), "due has shape"),
        (torch.ones(4, 2, dtype=torch.int32), "bool is needed"),
        (torch.ones(2, 4, dtype=torch.bool).T, "bool is needed"),
    ],
)
@BOTH
def test_who_is_due_must_fit(score, due, message):
    with pytest.raises(UsageError, match=message):
        run(draft_case(LENGTHS), score, due=due.to(DEVICE))


def test_the_buffers_end_before_the_tokens():
    """A last tile that is not whole."""
    case = draft_case([70], rows=2)
    found = [
        run(replace(case, lengths=[70]), score, length=75)[1]
        for score in (round_scores, round_scores_reference)
    ]
    assert error_ratio(found[0].nan_to_num(0), found[1].nan_to_num(0)) < 1e-5


@pytest.mark.parametrize(
    "change,message",
    [
        ({"heads": 5}, "multiple of 2 KV heads"),
        ({"rows": 40}, "need a tile of 256 rows"),
        ({"width": 8}, "own_out"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = draft_case([20], rows=change.get("rows", 2), query_heads=6)
    query = case.query[:, :, : change.get("heads", 6)].contiguous()
    heads = query.shape[2]
    lse = torch.zeros(*query.shape[:2], heads, device=DEVICE)
    places = torch.full((heads,), -1, dtype=torch.int32, device=DEVICE)
    heads_out = torch.zeros(1, 1, 32, device=DEVICE)
    own_out = torch.zeros(len(case.batch.block_table), 2, 32, device=DEVICE)[..., : change.get("width", 32)]
    with pytest.raises(UsageError, match=message):
        round_scores(
            query,
            case.keys,
            case.batch,
            lse,
            places,
            SCALING,
            heads_out=heads_out,
            own_out=own_out if "width" not in change else own_out.flatten(1),
        )
