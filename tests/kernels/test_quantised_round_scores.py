"""The draft's attention of a round from its quantised keys: in Triton's interpreter, and on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draft_case import BOUND, DEVICE, DTYPES, NAN, DraftCase, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys_reference
from specattn.kernels.quantised_round_scores import (
    BEHIND,
    Tiles,
    choose_tiles,
    quantised_round_scores,
    quantised_round_scores_reference,
)

SCALING = 0.21
LENGTHS = [150, 9, 0, 64]
LENGTH = 240
BOTH = pytest.mark.parametrize("score", [quantised_round_scores, quantised_round_scores_reference])

# rows, query heads, KV heads, channels: groups of 1, 3, 4, 7 and 8
SHAPES = [(1, 2, 2, 64), (2, 6, 2, 128), (4, 8, 2, 64), (4, 14, 2, 64), (9, 8, 1, 64)]


class Layers:
    """A case of two layers, whose keys lie at the same rows of two pools."""

    def __init__(self, lengths: list[int], bits: int, **shape: object) -> None:
        self.cases: list[DraftCase] = [draft_case(lengths, **shape, seed=0) for _ in range(2)]
        self.cases[1] = self._other(self.cases[0], self.cases[1])
        copies = [QuantisedKeys.empty(case.keys, bits) for case in self.cases]
        for case, copy in zip(self.cases, copies, strict=True):
            copy.codes.fill_(77)
            copy.ranges.fill_(NAN)
            for request in range(len(lengths)):
                quantise_keys_reference(case.keys, case.batch.visible_rows(request), copy)
        self.copy = QuantisedKeys(
            torch.cat([c.codes for c in copies]), torch.cat([c.ranges for c in copies]), bits
        )
        self.batch, self.lengths = self.cases[0].batch, lengths
        self.query = torch.stack([case.query.transpose(0, 1) for case in self.cases], 1)
        places = self.cases[0].export().places
        self.places = torch.stack([places, torch.where(places.flip(0) > 0, places.flip(0) + 20, -1)])
        self.lse = torch.stack([self._exact(request)[0] for request in range(len(lengths))], 2).float()

    @staticmethod
    def _other(first: DraftCase, second: DraftCase) -> DraftCase:
        return replace(second, query=first.query.flip(1) * 0.7, keys=first.keys * 1.3)

    def _exact(self, request: int) -> tuple[Tensor, Tensor]:
        return exact(self, request)


def exact(case: Layers, request: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exps ``[rows, layers, heads]`` and mean probabilities ``[layers, heads, length]``, in float64."""
    rows, layers, _, heads, _ = case.query.shape
    keys = case.copy.dequantise(case.batch.visible_rows(request)).double()
    group = heads * layers // keys.shape[1]
    lse = torch.zeros(rows, layers, heads, dtype=torch.float64, device=DEVICE)
    mean = torch.zeros(layers, heads, len(keys), dtype=torch.float64, device=DEVICE)
    for row in range(rows):
        seen = max(len(keys) - rows + 1 + row, 0)
        for layer in range(layers):
            for head in range(heads if seen else 0):
                key = keys[:seen, layer * (heads // group) + head // group]
                logits = key @ case.query[row, layer, request, head].double() * SCALING
                lse[row, layer, head] = logits.logsumexp(0)
                mean[layer, head, :seen] += logits.softmax(0) / rows
    return lse, mean


def run(
    case: Layers, score, length: int = LENGTH, dtype: torch.dtype = torch.float32, **options
) -> tuple[Tensor, Tensor]:
    heads_out = torch.full(
        (len(case.lengths), int(case.places.max()) + 2, length), NAN, dtype=dtype, device=DEVICE
    )
    lists, slots = case.copy.codes.shape[0], len(case.batch.block_table)
    own_out = torch.full((slots, lists, length), NAN, dtype=dtype, device=DEVICE)
    out = {"heads_out": heads_out, "own_out": own_out}
    score(case.query, case.copy, case.batch, case.lse, case.places, SCALING, **out, **options)
    return heads_out, own_out


def compare(case: Layers, heads_out: Tensor, own_out: Tensor, bound: float) -> None:
    """Against the exact means; what lies behind is zero, not what was there before."""
    for request, length in enumerate(case.lengths):
        mean = exact(case, request)[1]
        own = own_out[case.batch.slots[request]]
        found = [heads_out[request, case.places[at]] for at in map(tuple, (case.places >= 0).nonzero())]
        wanted = [mean[at] for at in map(tuple, (case.places >= 0).nonzero())]
        if length:
            lists = mean.unflatten(1, (own.shape[0] // len(mean), -1)).mean(2).flatten(0, 1)
            assert error_ratio(own[:, :length], lists) < bound
            assert error_ratio(torch.stack(found)[:, :length], torch.stack(wanted)) < bound
        assert not own[:, length : length + BEHIND].any()
        assert not torch.stack(found)[:, length : length + BEHIND].any()


@BOTH
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_mean_attention_of_the_rows(score, bits, rows, query_heads, kv_heads, head_dim):
    case = Layers(LENGTHS, bits, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    compare(case, *run(case, score), bound=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_queries_of_16_bits(bits, dtype):
    """Codes are exact in float16, and so is what is summed: nothing is rounded but the queries."""
    case = Layers([150, 9], bits, rows=4, query_heads=14, dtype=dtype)
    compare(case, *run(case, quantised_round_scores), bound=1e-5)
    compare(case, *run(case, quantised_round_scores, dtype=torch.float16), bound=BOUND[torch.float16])


@pytest.mark.parametrize("tiles", [Tiles(64, 1, 4, 2), Tiles(32, 3, 4, 3), Tiles(256, 2, 4, 1)])
def test_any_tiles(tiles):
    case = Layers([150, 64, 130], 4, rows=4, query_heads=14)
    compare(case, *run(case, quantised_round_scores, tiles=tiles), bound=1e-5)


@BOTH
def test_no_probability_is_above_one(score):
    """Quantised keys whose logits are far above what the exact ones sum up to, and would overflow."""
    case = Layers([40, 0], 4, rows=3)
    case.lse -= 500
    heads_out, own_out = run(case, score)
    own = own_out[case.batch.slots[0], :, :38]
    assert error_ratio(own, torch.ones_like(own)) < 1e-6
    heads = heads_out[0, case.places[case.places >= 0].long()]
    assert error_ratio(heads[:, :38], torch.ones_like(heads[:, :38])) < 1e-6
    assert not heads[:, 40:].nan_to_num(0).any()


@BOTH
def test_only_the_requests_slots_are_written(score):
    case = Layers(LENGTHS, 4)
    _, own_out = run(case, score)
    others = set(range(len(own_out))) - set(case.batch.slots.tolist())
    assert others and all(own_out[slot].isnan().all() for slot in others)


@BOTH
@pytest.mark.parametrize("bits,rows,query_heads,kv_heads", [(4, 4, 14, 2), (8, 3, 9, 3), (8, 1, 2, 1)])
def test_heads_that_are_not_due_are_left_alone(score, bits, rows, query_heads, kv_heads):
    """Others of each request and layer; what lies behind them is not written either."""
    case = Layers(LENGTHS, bits, rows=rows, query_heads=query_heads, kv_heads=kv_heads)
    request = torch.arange(len(LENGTHS), device=DEVICE)[:, None]
    due = (request + torch.arange(2 * kv_heads, device=DEVICE)) % 3 == 0
    everything, some = run(case, score), run(case, score, due=due)
    for request, slot in enumerate(case.batch.slots.tolist()):
        for head in range(2 * kv_heads):
            group = case.places.view(2 * kv_heads, -1)[head]
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


@BOTH
def test_who_is_due_must_fit(score):
    case = Layers(LENGTHS, 8)
    with pytest.raises(UsageError, match="due has shape"):
        run(case, score, due=torch.ones(len(LENGTHS), 2, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("length", [75, 64])
def test_the_buffers_end_before_the_tokens_behind(length):
    case = Layers([70], 4)
    case.batch.lengths.fill_(min(length, 70))
    found = [run(case, score, length=length) for score in BOTH.args[1]]
    for kernel, reference in zip(*found, strict=True):
        assert error_ratio(kernel.nan_to_num(0), reference.nan_to_num(0)) < 1e-5


def test_rows_need_not_lie_beside_each_other():
    case = Layers([70, 9], 8, rows=4)
    wanted = run(case, quantised_round_scores)
    case.query = case.query.transpose(0, 2).contiguous().transpose(0, 2)
    assert not case.query.is_contiguous()
    for apart, beside in zip(run(case, quantised_round_scores), wanted, strict=True):
        assert torch.equal(apart.nan_to_num(-1), beside.nan_to_num(-1))


@pytest.mark.parametrize(
    "bits,shape,message",
    [
        (8, {"head_dim": 16, "rows": 2}, "8 bits are too narrow: 32 channels"),
        (4, {"head_dim": 32, "rows": 2}, "4 bits are too narrow: 64 channels"),
        (2, {"rows": 2}, "bits=2: the kernel takes 4 or 8"),
        (8, {"rows": 40}, "need a tile of 256 rows"),
    ],
)
def test_what_does_not_fit_is_named(bits, shape, message):
    case = Layers([20], bits, query_heads=6, **shape)
    with pytest.raises(UsageError, match=message):
        run(case, quantised_round_scores)


def test_the_copy_is_that_of_all_layers():
    case = Layers([20], 8)
    case.copy = QuantisedKeys(case.copy.codes[:3], case.copy.ranges[:3], 8)
    with pytest.raises(UsageError, match="do not share 3 heads"):
        run(case, quantised_round_scores)


def test_tiles_leave_room_for_sums():
    for rows in (16, 32, 64, 128):
        for head_dim in (32, 64, 128, 256):
            tiles = choose_tiles(rows, head_dim)
            assert tiles.tokens * max(rows, head_dim // 8) <= 64 * 32 * tiles.warps
