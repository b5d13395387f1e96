"""The draft's sparse attention in its two phases, scores and values: in Triton's interpreter, and on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draft_case import BOUND, CUDA, DEVICE, DTYPES, NAN, SHAPES, DraftCase, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.export_attention import export_attention_reference
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys_reference
from specattn.kernels.quantised_scores import quantised_scores, quantised_scores_reference
from specattn.kernels.score_export import ScoreExport
from specattn.kernels.value_attention import value_attention, value_attention_reference
from specattn.selection.base import Selection

SCALING = 0.21
LENGTHS = [150, 9, 0]
BITS = [4, 8]


def quantised(case: DraftCase, bits: int) -> QuantisedKeys:
    """The copy of all cached tokens; of other rows the scale is NaN."""
    copy = QuantisedKeys.empty(case.keys, bits)
    copy.codes.fill_(77)
    copy.ranges.fill_(NAN)
    for request in range(len(case.lengths)):
        quantise_keys_reference(case.keys, case.batch.visible_rows(request), copy)
    return copy


def score(
    case: DraftCase,
    copy: QuantisedKeys,
    kernel=quantised_scores,
    splits: int = 2,
    dtype: torch.dtype = torch.float32,
    export: ScoreExport | None = None,
) -> tuple[Tensor, Tensor]:
    logits, lse = case.scores(dtype)
    kernel(
        case.query,
        copy,
        case.batch,
        SCALING,
        logits=logits,
        lse=lse,
        workspace=case.workspace(splits),
        export=export,
    )
    return logits, lse


def exact(case: DraftCase, copy: QuantisedKeys, request: int) -> Tensor:
    """Probabilities ``[rows, heads, length]`` over the dequantised keys, one row and head at a time, in float64."""
    key = copy.dequantise(case.batch.visible_rows(request)).double()
    rows, heads, _ = case.query.shape[1:]
    result = torch.zeros(rows, heads, len(key), dtype=torch.float64, device=DEVICE)
    for row in range(rows):
        seen = len(key) - rows + 1 + row
        for head in range(heads if seen > 0 else 0):
            kv = head // (heads // key.shape[1])
            logits = key[:seen, kv] @ case.query[request, row, head].double() * SCALING
            result[row, head, :seen] = logits.softmax(0)
    return result


def probabilities(logits: Tensor, lse: Tensor, request: int, length: int) -> Tensor:
    seen = logits[request, ..., :length].double() - lse[request, ..., None]
    return seen.exp().nan_to_num(0)  # NaN: a row that sees nothing


@pytest.mark.parametrize("kernel", [quantised_scores, quantised_scores_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_scores(kernel, bits, rows, query_heads, kv_heads, head_dim):
    case = draft_case(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    copy = quantised(case, bits)
    logits, lse = score(case, copy, kernel)
    for request, length in enumerate(case.lengths):
        expected = exact(case, copy, request)
        assert error_ratio(probabilities(logits, lse, request, length), expected) < 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("score_dtype,bound", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_scores_in_the_dtypes_of_a_gpu(bits, dtype, score_dtype, bound):
    """Queries are read in 16 bits; nothing is rounded before the logits are."""
    case = draft_case([70, 9], query_heads=14, dtype=dtype)
    copy = quantised(case, bits)
    logits, lse = score(case, copy, dtype=score_dtype)
    for request, length in enumerate(case.lengths):
        assert error_ratio(probabilities(logits, lse, request, length), exact(case, copy, request)) < bound


@pytest.mark.parametrize("splits", [1, 5])
def test_scores_with_any_number_of_splits(splits):
    case = draft_case([300, 129, 1])
    copy = quantised(case, 4)
    logits, lse = score(case, copy, splits=splits)
    for request, length in enumerate(case.lengths):
        assert error_ratio(probabilities(logits, lse, request, length), exact(case, copy, request)) < 1e-5


@pytest.mark.parametrize("length", [0, 1, 16, 17, 31])
def test_what_is_written_of_the_scores(length):
    """All that is seen, minus infinity to a multiple of 16 and where a row does not see, and nothing else."""
    case = draft_case([length, 40], rows=2)
    logits, lse = score(case, quantised(case, 4))
    whole = -(-length // 16) * 16
    for row in range(2):
        seen = max(0, length - 1 + row)
        assert logits[0, row, :, :seen].isfinite().all()
        assert (logits[0, row, :, seen:whole] == float("-inf")).all()
        assert lse[0, row].isfinite().all() if seen else (lse[0, row] == float("-inf")).all()
    assert logits[0, :, :, whole:].isnan().all()


def test_the_last_rows_scores_are_exported_as_well():
    case = draft_case(LENGTHS, query_heads=14)
    export = case.export()
    logits, lse = score(case, quantised(case, 4), export=export)
    heads = (export.places >= 0).nonzero().flatten()
    places = export.places[heads].long()
    assert torch.equal(export.logits[:, places].nan_to_num(7), logits[:, -1, heads].nan_to_num(7))
    assert torch.equal(export.lse[:, places], lse[:, -1, heads])
    spare = [place for place in range(export.logits.shape[1]) if place not in places]
    assert export.logits[:, spare].isnan().all() and export.lse[:, spare].isnan().all()


def test_scores_of_keys_with_large_biases():
    """What all keys share cancels: the scores are as exact as those of small keys."""
    case = draft_case([200, 90], offset=80.0)
    case = replace(case, query=case.query.abs())
    copy = quantised(case, 8)
    logits, lse = score(case, copy, dtype=torch.float16)
    for request, length in enumerate(case.lengths):
        assert error_ratio(probabilities(logits, lse, request, length), exact(case, copy, request)) < 4e-3


def random_lists(case: DraftCase, density: float, seed: int = 0) -> Selection:
    """Lists with poisoned padding: a position that is no token's."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(case.lengths), case.keys.shape[1], max(case.lengths), generator=generator) < density
    for request, length in enumerate(case.lengths):
        mask[request, :, length:] = False
        mask[request, :, max(0, length - 2) : length] = True
    selection = Selection.from_mask(mask.to(DEVICE))
    return Selection(torch.where(selection.indices < 0, 2**30, selection.indices), selection.counts)


def attend(case: DraftCase, logits: Tensor, lists: Selection, splits: int = 2, **changes: object) -> Tensor:
    arguments = {
        "logits": logits,
        "values": case.values,
        "indices": lists.indices,
        "counts": lists.counts,
        "batch": case.batch,
        "out": case.out(),
        "workspace": case.workspace(splits),
    }
    kernel = changes.pop("kernel", value_attention)
    return kernel(**arguments | changes)


def expected_output(case: DraftCase, logits: Tensor, lists: Selection, request: int) -> Tensor:
    """One row and head at a time, in float64, from the logits of the listed tokens."""
    value = case.clean_values[request].double()
    rows, heads, head_dim = case.query.shape[1:]
    out = torch.zeros(rows, heads, head_dim, dtype=torch.float64, device=DEVICE)
    for row in range(rows):
        for head in range(heads):
            kv = head // (heads // value.shape[1])
            chosen = lists.indices[request, kv, : lists.counts[request, kv]].long()
            weights = logits[request, row, head, chosen].double()
            if weights.isfinite().any():
                out[row, head] = weights.softmax(0) @ value[chosen, kv]
    return out


@pytest.mark.parametrize("kernel", [value_attention, value_attention_reference])
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_values_of_listed_tokens(kernel, rows, query_heads, kv_heads, head_dim):
    case = draft_case(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    logits, _ = score(case, quantised(case, 8), quantised_scores_reference)
    lists = random_lists(case, 0.3)
    out = attend(case, logits, lists, kernel=kernel)
    for request in range(len(case.lengths)):
        assert error_ratio(out[request], expected_output(case, logits, lists, request)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_in_the_dtypes_of_a_gpu(dtype):
    case = draft_case(LENGTHS, query_heads=14, dtype=dtype)
    logits, _ = score(case, quantised(case, 8), quantised_scores_reference, dtype=torch.float16)
    lists = random_lists(case, 0.3)
    out = attend(case, logits, lists)
    for request in range(len(case.lengths)):
        assert error_ratio(out[request], expected_output(case, logits, lists, request)) < BOUND[dtype]


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_short_and_complete_lists_in_any_number_of_splits(splits, density):
    case = draft_case([300, 129, 1], page_size=64)
    logits, _ = score(case, quantised(case, 8), quantised_scores_reference)
    lists = random_lists(case, density)
    out = attend(case, logits, lists, splits)
    for request in range(len(case.lengths)):
        assert error_ratio(out[request], expected_output(case, logits, lists, request)) < 1e-5


def test_only_listed_values_are_read():
    case = draft_case([90, 40])
    logits, _ = score(case, quantised(case, 8), quantised_scores_reference)
    lists = random_lists(case, 0.2)
    values = torch.full_like(case.values, NAN)
    for request in range(2):
        for head in range(values.shape[1]):
            chosen = lists.indices[request, head, : lists.counts[request, head]]
            rows = case.batch.rows(request, chosen)
            values[rows, head] = case.values[rows, head]
    assert torch.equal(attend(case, logits, lists, values=values), attend(case, logits, lists))


def test_a_far_tail_of_a_heads_attention_still_makes_a_mean():
    """The list of a group may hold a vanishing share of one of its heads' attention."""
    case = draft_case([40], rows=1, query_heads=1, kv_heads=1)
    logits, _ = case.scores()
    logits[..., :40] = torch.where(torch.arange(40, device=DEVICE) < 4, 0.0, -200.0)
    lists = Selection(torch.tensor([[[8, 9]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32))
    lists = Selection(lists.indices.to(DEVICE), lists.counts.to(DEVICE))
    expected = case.clean_values[0][8:10, 0].mean(0)
    assert error_ratio(attend(case, logits, lists)[0, 0, 0], expected) < 1e-5


def test_complete_lists_over_8_bits_are_nearly_dense_attention():
    case = draft_case(LENGTHS, rows=2)
    logits, _ = score(case, quantised(case, 8))
    out = attend(case, logits, random_lists(case, 1.0))
    dense = export_attention_reference(
        case.query, case.keys, case.values, case.batch, SCALING, out=case.out()
    )
    assert error_ratio(out, dense) < 0.03


@pytest.mark.parametrize("bits", BITS)
def test_a_rejected_token_leaves_no_trace_in_the_scores(bits):
    """Append, roll back, append again: scores are those of a cache that never held the rejected tokens."""
    case = draft_case([40])
    clean = quantised(case, bits)
    rows = case.batch.rows(0, torch.arange(34, 40, device=DEVICE))
    copy = quantised(case, bits)
    garbage = case.keys.clone()
    garbage[rows] = 1e3 * torch.randn_like(garbage[rows])
    quantise_keys_reference(garbage, rows, copy)
    shorter = replace(case, batch=replace(case.batch, lengths=case.batch.lengths - 6))
    assert torch.equal(score(shorter, copy)[1], score(shorter, clean)[1])
    quantise_keys_reference(case.keys, rows, copy)
    assert torch.equal(score(case, copy)[0].nan_to_num(7), score(case, clean)[0].nan_to_num(7))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda case: {"logits": case.scores()[0][:, :1]}, "logits has shape"),
        (lambda case: {"logits": case.scores()[0][..., :-1]}, "contiguous"),
        (lambda case: {"indices": torch.zeros(3, 3, 5, dtype=torch.int32)}, "indices has shape"),
        (lambda case: {"counts": torch.zeros(3, dtype=torch.int32)}, "counts has shape"),
        (lambda case: {"values": case.values[..., :32]}, "values has shape"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, message):
    case = draft_case(LENGTHS)
    lists = random_lists(case, 0.5)
    with pytest.raises(UsageError, match=message):
        attend(case, **{"logits": case.scores()[0], "lists": lists} | change(case))


def test_scores_that_do_not_fit_are_refused():
    case = draft_case(LENGTHS)
    other = draft_case(LENGTHS, head_dim=32)
    with pytest.raises(UsageError, match="codes has shape"):
        score(case, QuantisedKeys.empty(other.keys, 4))
    with pytest.raises(UsageError, match="lse has shape"):
        score(
            case, QuantisedKeys.empty(case.keys, 4), export=replace(case.export(), lse=case.export().lse[1:])
        )


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_both_phases_can_be_captured():
    case = draft_case([700, 90], query_heads=14, dtype=torch.float16)
    copy, lists, workspace = quantised(case, 4), random_lists(case, 0.2), case.workspace(16)
    (logits, lse), out = case.scores(torch.float16), case.out()

    def step() -> None:
        quantised_scores(case.query, copy, case.batch, SCALING, logits=logits, lse=lse, workspace=workspace)
        value_attention(
            logits, case.values, lists.indices, lists.counts, case.batch, out=out, workspace=workspace
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        fresh = random_lists(case, 0.1 + 0.3 * seed, seed)
        lists.indices.copy_(fresh.indices)
        lists.counts.copy_(fresh.counts)
        graph.replay()
        for request in range(2):
            expected = expected_output(case, logits, fresh, request)
            assert error_ratio(out[request], expected) < BOUND[torch.float16]
