"""The draft's attention of a round in one launch: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from draft_case import BOUND, DEVICE, DTYPES, NAN, SHAPES, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.round_scores import TILE_TOKENS, TILES, round_scores, round_scores_reference

SCALING = 0.21
LENGTHS = [150, 9, 0, 33]
LAYERS = 3
BOTH = pytest.mark.parametrize("score", [round_scores, round_scores_reference])


class Layers:
    """A case of three layers, whose keys lie at the same rows of their pools; the one in the middle exports no head.

    Attributes:
        keys: with NaN in what must not be read, and layers that do not lie beside each other.
        clean: each request's keys ``[layers, tokens, kv_heads, head_dim]``, in token order.
    """

    def __init__(self, lengths: list[int], **shape: object) -> None:
        case = draft_case(lengths, **shape)
        self.lengths, self.batch = lengths, case.batch
        layers = torch.tensor([1.0, 1.3, 0.7], device=DEVICE).to(case.keys.dtype)[:, None, None, None]
        keys = case.keys.new_full((LAYERS, 2, *case.keys.shape), NAN)
        keys[:, 0] = case.keys * layers
        self.keys = keys[:, 0]
        self.clean = [key.to(case.keys.dtype) * layers for key in case.clean_keys]
        rows = case.query.transpose(0, 1)
        self.query = torch.stack([rows, rows.flip(2) * 0.7, rows.flip(0) * 1.1], 1)
        places = case.export().places
        none = torch.full_like(places, -1)
        self.places = torch.stack([places, none, torch.where(places > 0, places + 20, -1).flip(0)])
        self.lse = torch.stack([self.exact(request)[0] for request in range(len(lengths))], 2).float()

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2]

    def exact(self, request: int) -> tuple[Tensor, Tensor]:
        """Log-sum-exps ``[rows, layers, heads]`` and mean probabilities ``[layers, heads, length]``, in float64."""
        rows, layers, _, heads, _ = self.query.shape
        key, group = self.clean[request].double(), heads // self.kv_heads
        lse = torch.zeros(rows, layers, heads, dtype=torch.float64, device=DEVICE)
        mean = torch.zeros(layers, heads, key.shape[1], dtype=torch.float64, device=DEVICE)
        for row in range(rows):
            seen = max(key.shape[1] - rows + 1 + row, 0)
            for layer in range(layers):
                for head in range(heads if seen else 0):
                    logits = key[layer, :seen, head // group] @ self.query[row, layer, request, head].double()
                    lse[row, layer, head] = (logits * SCALING).logsumexp(0)
                    mean[layer, head, :seen] += (logits * SCALING).softmax(0) / rows
        return lse, mean

    def own(self, mean: Tensor) -> Tensor:
        """Of means of heads those of groups, ``[layers * kv_heads, length]``."""
        return mean.unflatten(1, (self.kv_heads, -1)).mean(2).flatten(0, 1)

    def exported(self) -> list[tuple[int, int]]:
        """Layers and heads."""
        return [(layer, head) for layer, head in (self.places >= 0).nonzero().tolist()]


def run(
    case: Layers, score, length: int = 192, dtype: torch.dtype = torch.float32, **changes: Tensor
) -> tuple[Tensor, Tensor]:
    """What is written into poisoned outputs; ``changes`` are arguments that differ from the case's."""
    own_out = torch.full(
        (len(case.batch.block_table), LAYERS * case.kv_heads, length), NAN, dtype=dtype, device=DEVICE
    )
    heads_out = own_out.new_full((len(case.lengths), int(case.places.max()) + 2, length), NAN)
    given = {"query": case.query, "keys": case.keys, "lse": case.lse, "places": case.places}
    given |= {"heads_out": heads_out, "own_out": own_out}
    score(batch=case.batch, scaling=SCALING, **given | changes)
    return heads_out, own_out


def same(found: Tensor, wanted: Tensor) -> bool:
    """Bit by bit, and nothing written where the other has nothing."""
    return torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))


@BOTH
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_attention_of_the_rows(score, dtype, rows, query_heads, kv_heads, head_dim):
    case = Layers(
        LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    heads_out, own_out = run(case, score)
    untouched = set(range(heads_out.shape[1])) - {int(case.places[at]) for at in case.exported()}
    for request, length in enumerate(LENGTHS):
        mean = case.exact(request)[1]
        own = own_out[case.batch.slots[request]]
        if length:
            assert error_ratio(own[:, :length].double(), case.own(mean)) < BOUND[dtype]
        assert not own[:, length : length + 32].any(), "what lies behind is zero, not what was there before"
        for at in case.exported():
            found = heads_out[request, case.places[at]]
            if length:
                assert error_ratio(found[:length].double(), mean[at]) < BOUND[dtype]
            assert not found[length : length + 32].any()
        assert heads_out[request, sorted(untouched)].isnan().all()


@BOTH
def test_rows_of_infinite_sums_do_not_count(score):
    """So rows that were rejected are left out of a round's mean."""
    case = Layers([150, 33], rows=3)
    outs = []
    for first in (False, True):
        kept = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        kept[:1] = first
        kept[1:] = not first
        lse = case.lse.masked_fill(~kept[:, None, None, None], float("inf"))
        outs.append(run(case, score, lse=lse)[1][case.batch.slots])
    for request, length in enumerate((150, 33)):
        parts = sum(out[request, :, :length].double() for out in outs)
        assert error_ratio(parts, case.own(case.exact(request)[1])) < 1e-2
        assert all(out[request, :, :length].isfinite().all() and out[request].any() for out in outs)


def test_no_token_weighs_more_than_the_list():
    """Sums over lists that attention has moved away from are too small, by far."""
    rows, query_heads, kv_heads, head_dim = SHAPES[-1]
    case = Layers(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    usual = run(case, round_scores_reference)[0].nan_to_num(0)
    found, wanted = (
        run(case, score, lse=case.lse - 4)[0].nan_to_num(0).double()
        for score in (round_scores, round_scores_reference)
    )
    assert error_ratio(found, wanted) < BOUND[torch.float32]
    assert 0.99 < float(wanted.max()) <= 1 < float(usual.max()) * math.exp(4)


@BOTH
def test_only_the_requests_slots_are_written(score):
    case = Layers(LENGTHS)
    _, own_out = run(case, score)
    others = set(range(len(own_out))) - set(case.batch.slots.tolist())
    assert others and all(own_out[slot].isnan().all() for slot in others)


@BOTH
def test_rows_need_not_lie_beside_each_other(score):
    case = Layers(LENGTHS, rows=4)
    apart = case.query.transpose(0, 2).contiguous().transpose(0, 2)
    assert not apart.is_contiguous()
    for found, wanted in zip(run(case, score, query=apart), run(case, score), strict=True):
        assert same(found, wanted)


@BOTH
def test_layers_may_lie_beside_each_other(score):
    """As a cache has them, and as one does that was asked for more."""
    case = Layers(LENGTHS)
    assert not case.keys.is_contiguous()
    beside = case.keys.contiguous()
    for found, wanted in zip(run(case, score, keys=beside), run(case, score), strict=True):
        assert same(found, wanted)


@BOTH
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", [(1, 6, 3, 64), (5, 14, 2, 64), (2, 3, 1, 32)])
def test_heads_that_are_not_due_are_left_alone(score, rows, query_heads, kv_heads, head_dim):
    """Others of each request; what lies behind them is not written either."""
    case = Layers(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    request = torch.arange(len(LENGTHS), device=DEVICE)[:, None]
    wide = (request + torch.arange(LAYERS * kv_heads + 1, device=DEVICE)) % 3 == 0
    due = wide[:, :-1]
    assert not due.is_contiguous() and (due.any(1) & ~due.all(1)).all()
    everything, some = run(case, score), run(case, score, due=due)
    for request, slot in enumerate(case.batch.slots.tolist()):
        for head in range(LAYERS * kv_heads):
            group = case.places.view(LAYERS * kv_heads, -1)[head]
            exported = group[group >= 0].long()
            pairs = [
                (some[1][slot, head], everything[1][slot, head]),
                (some[0][request, exported], everything[0][request, exported]),
            ]
            for found, wanted in pairs:
                if due[request, head]:
                    assert same(found, wanted)
                else:
                    assert found.isnan().all()
    others = set(range(len(some[1]))) - set(case.batch.slots.tolist())
    assert all(some[1][slot].isnan().all() for slot in others)


def test_the_keys_of_heads_that_are_not_due_are_not_read():
    case = Layers(LENGTHS)
    keys = case.keys.clone()
    keys[0, :, 1] = keys[1] = NAN
    due = torch.tensor([[True, False, False, False, True, True]] * len(LENGTHS), device=DEVICE)
    found = run(case, round_scores, keys=keys, due=due)
    for part, wanted in zip(found, run(case, round_scores, due=due), strict=True):
        assert same(part, wanted)


@pytest.mark.parametrize("length", [1000, TILE_TOKENS * TILES - 3, TILE_TOKENS * TILES, 1030])
def test_more_than_one_stretch(length):
    """The second has a few tokens at most, and zeros behind the last one; in the third there is nothing to do."""
    case = Layers([length, 9], rows=2, query_heads=2, kv_heads=1, head_dim=16)
    found = [run(case, score, length=3 * TILE_TOKENS * TILES) for score in BOTH.args[1]]
    for kernel, reference in zip(*found, strict=True):
        assert error_ratio(kernel.nan_to_num(0), reference.nan_to_num(0)) < 1e-5
    own = found[0][1][case.batch.slots[0]]
    assert not own[:, length : length + TILE_TOKENS].any()
    assert own[:, 2 * TILE_TOKENS * TILES :].isnan().all()


@pytest.mark.parametrize(
    "due,message",
    [
        (torch.ones(4, 2, dtype=torch.bool), "due has shape"),
        (torch.ones(4, 6, dtype=torch.int32), "bool is needed"),
        (torch.ones(6, 4, dtype=torch.bool).T, "bool is needed"),
    ],
)
@BOTH
def test_who_is_due_must_fit(score, due, message):
    with pytest.raises(UsageError, match=message):
        run(Layers(LENGTHS), score, due=due.to(DEVICE))


def test_the_buffers_end_before_the_tokens():
    """A last tile that is not whole."""
    case = Layers([70], rows=2)
    found = [run(case, score, length=75)[1] for score in BOTH.args[1]]
    assert error_ratio(found[0].nan_to_num(0), found[1].nan_to_num(0)) < 1e-5


def test_more_rows_than_a_tile_are_refused():
    with pytest.raises(UsageError, match="need a tile of 256 rows"):
        run(Layers([20], rows=40, query_heads=6), round_scores)


@BOTH
@pytest.mark.parametrize(
    "change,message",
    [
        (lambda case: {"query": case.query[..., :5, :], "lse": case.lse[..., :5]}, "multiple of 2 KV heads"),
        (lambda case: {"keys": case.keys[0]}, "keys"),
        (lambda case: {"keys": case.keys[:2]}, "keys"),
        (lambda case: {"keys": case.keys[:, ::2]}, "pool of a layer's keys must be contiguous"),
        (lambda case: {"places": case.places[0]}, "places"),
        (lambda case: {"own_out": torch.zeros(3, 2, 192, device=DEVICE)}, "own_out"),
        (lambda case: {"query": case.query.transpose(0, 1)}, "keys"),
        (lambda case: {"lse": case.lse.transpose(0, 3).contiguous().transpose(0, 3)}, "lse"),
    ],
)
def test_what_does_not_fit_is_named(score, change, message):
    case = Layers([20], rows=2, query_heads=6)
    changes = change(case)
    if "query" in changes and changes["query"].shape[3] == 5:
        changes["places"] = case.places[:, :5].contiguous()
    with pytest.raises(UsageError, match=message):
        run(case, score, **changes)
