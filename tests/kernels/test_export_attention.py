"""Decode attention with exported scores: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from draft_case import BOUND, CUDA, DEVICE, DTYPES, NAN, SHAPES, DraftCase, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import attention_probabilities
from specattn.kernels.export_attention import export_attention, export_attention_reference
from specattn.kernels.score_export import ScoreExport, export_places

SCALING = 0.21
LENGTHS = [150, 9, 0, 33]
BOTH = pytest.mark.parametrize("attend", [export_attention, export_attention_reference])


def run(
    case: DraftCase, attend=export_attention, splits: int = 4, **options: object
) -> tuple[Tensor, ScoreExport]:
    export = case.export(**options)
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    out = attend(*arguments, out=case.out(), workspace=case.workspace(splits), export=export)
    return out, export


def exact(case: DraftCase, request: int) -> tuple[Tensor, Tensor]:
    """Outputs and, of the last row, probabilities of all heads, in float64 and one row and head at a time."""
    key, value = case.clean_keys[request].double(), case.clean_values[request].double()
    rows, heads, _ = case.query.shape[1:]
    out = torch.zeros(case.query.shape[1:], dtype=torch.float64, device=DEVICE)
    last = torch.zeros(heads, len(key), dtype=torch.float64, device=DEVICE)
    for row in range(rows):
        seen = len(key) - rows + 1 + row
        for head in range(heads if seen > 0 else 0):
            kv = head // (heads // key.shape[1])
            logits = key[:seen, kv] @ case.query[request, row, head].double() * SCALING
            weights = logits.softmax(0)
            out[row, head] = weights @ value[:seen, kv]
            last[head, :seen] = weights
    return out, last


def exported(export: ScoreExport, request: int, length: int) -> dict[int, Tensor]:
    """The probabilities that were exported for each head."""
    heads = (export.places >= 0).nonzero().flatten().tolist()
    result = {}
    for head in heads:
        place = export.places[head]
        logits = export.logits[request, place, :length].double()
        result[head] = (logits - export.lse[request, place]).exp()
    return result


def check(case: DraftCase, out: Tensor, export: ScoreExport, bound: float) -> None:
    for request, length in enumerate(case.lengths):
        expected, last = exact(case, request)
        assert error_ratio(out[request], expected) < bound
        for head, probabilities in exported(export, request, length).items():
            assert error_ratio(probabilities, last[head]) < bound


@BOTH
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_outputs_and_scores(attend, rows, query_heads, kv_heads, head_dim):
    case = draft_case(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    check(case, *run(case, attend), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("export_dtype", [torch.float32, torch.float16])
def test_the_dtypes_of_a_gpu(dtype, export_dtype):
    case = draft_case(LENGTHS, query_heads=14, dtype=dtype)
    check(case, *run(case, dtype=export_dtype), max(BOUND[dtype], BOUND[export_dtype]))


@pytest.mark.parametrize("splits", [1, 4, 13])
def test_any_number_of_splits(splits):
    case = draft_case([300, 129, 128, 1])
    check(case, *run(case, splits=splits), 1e-5)


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65])
def test_page_boundaries(page_size, length):
    case = draft_case([length, 127], page_size=page_size, query_heads=3, kv_heads=1, head_dim=32)
    check(case, *run(case), 1e-5)


@pytest.mark.parametrize("length", [0, 1, 16, 17, 31])
def test_what_is_written_of_the_export(length):
    """All that is seen, minus infinity up to a multiple of 16, and nothing else."""
    case = draft_case([length, 40])
    _, export = run(case)
    reference = case.export()
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    export_attention_reference(*arguments, out=case.out(), export=reference)
    whole = -(-length // 16) * 16
    for place in range(export.logits.shape[1]):
        row = export.logits[0, place]
        if place in export.places:
            assert torch.allclose(row[:length], reference.logits[0, place, :length], atol=1e-5)
            assert (row[length:whole] == float("-inf")).all()
            assert row[whole:].isnan().all()
            assert error_ratio(export.lse[0, place].exp(), reference.lse[0, place].exp()) < 1e-5
        else:
            assert row.isnan().all() and export.lse[0, place].isnan()


def test_a_buffer_that_ends_with_the_context():
    case = draft_case([37, 21])
    _, roomy = run(case)
    tight = case.export()
    tight = replace(tight, logits=torch.full_like(tight.logits[..., :37], NAN))
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    export_attention(*arguments, out=case.out(), workspace=case.workspace(), export=tight)
    assert torch.equal(tight.logits.nan_to_num(7), roomy.logits[..., :37].nan_to_num(7))


def test_a_strided_view_of_a_rounds_buffer():
    """A step writes one row of ``[batch, rows, heads, length]``."""
    case = draft_case(LENGTHS)
    _, expected = run(case)
    logits = torch.full((4, 3, *expected.logits.shape[1:]), NAN, device=DEVICE)
    lse = torch.full((4, 3, expected.lse.shape[1]), NAN, device=DEVICE)
    view = replace(expected, logits=logits[:, 1], lse=lse[:, 1])
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    export_attention(*arguments, out=case.out(), workspace=case.workspace(), export=view)
    assert torch.equal(logits[:, 1].nan_to_num(7), expected.logits.nan_to_num(7))
    assert logits[:, [0, 2]].isnan().all() and lse[:, [0, 2]].isnan().all()


def test_scores_do_not_change_the_output():
    case = draft_case(LENGTHS)
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    plain = export_attention(*arguments, out=case.out(), workspace=case.workspace())
    assert error_ratio(run(case)[0], plain) < 1e-6


def test_a_workspace_serves_one_launch_after_the_other():
    case = draft_case([300, 40])
    workspace = case.workspace(6)
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    outs = [export_attention(*arguments, out=case.out(), workspace=workspace) for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert (workspace.arrivals == 0).all()


def test_large_biases_keep_their_scores_exact_in_float16():
    """All logits near 800: float16 could tell them apart in steps of half a unit only."""
    case = draft_case([200, 90], offset=80.0)
    case = replace(case, query=case.query.abs())
    assert (attention_logits(case) > 500).all()
    check(case, *run(case, dtype=torch.float16), 4e-3)
    raw = attention_logits(case).half().float()
    assert error_ratio(raw.softmax(-1), attention_logits(case).softmax(-1)) > 0.1


def attention_logits(case: DraftCase) -> Tensor:
    return case.query[0, -1, 0].float() @ case.clean_keys[0][:, 0].float().T * SCALING


def test_probabilities_are_those_of_the_pytorch_path():
    case = draft_case([77], query_heads=6, kv_heads=2)
    _, export = run(case)
    segments = [(case.clean_keys[0], case.clean_values[0])]
    expected = attention_probabilities(case.query[0], segments, 75, 0, SCALING)[:, -1]
    for head, probabilities in exported(export, 0, 77).items():
        assert error_ratio(probabilities, expected[head]) < 1e-5


def test_places_of_a_models_heads():
    places = export_places(torch.tensor([1, 6, 7, 11]), layers=3, query_heads=4)
    assert places.tolist() == [[-1, 0, -1, -1], [-1, -1, 1, 2], [-1, -1, -1, 3]]
    assert places.dtype == torch.int32


@pytest.mark.parametrize("heads", [[2, 1], [1, 1], [-1, 2], [3, 12]])
def test_places_need_ascending_numbers(heads):
    with pytest.raises(UsageError, match="ascending"):
        export_places(torch.tensor(heads), layers=3, query_heads=4)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda case: {"values": case.values[:-1]}, "values has shape"),
        (lambda case: {"out": case.out()[:, :1]}, "out has shape"),
        (lambda case: {"keys": case.keys[..., :48]}, "keys has shape"),
        (lambda case: {"query": case.query[:, :, :5]}, "no multiple"),
        (lambda case: {"query": case.query[:3]}, "query has shape"),
        (lambda case: {"query": case.query[..., :48]}, "powers of two"),
        (lambda case: {"query": case.query.repeat(1, 32, 1, 1)}, "from 1 to 128 fit"),
        (lambda case: {"batch": replace(case.batch, page_size=12)}, "powers of two"),
        (lambda case: {"workspace": draft_case([9]).workspace(1)}, "workspace"),
        (lambda case: {"export": replace(case.export(), lse=case.export().lse[:1])}, "lse has shape"),
        (
            lambda case: {"export": replace(case.export(), places=case.export().places[:3])},
            "places has shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = draft_case(LENGTHS)
    arguments = {
        "query": case.query,
        "keys": case.keys,
        "values": case.values,
        "batch": case.batch,
        "scaling": SCALING,
        "out": case.out(),
        "workspace": case.workspace(),
        "export": case.export(),
    }
    with pytest.raises(UsageError, match=message):
        export_attention(**arguments | change(case))


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_captured_launch_follows_the_lengths():
    case = draft_case([700, 90], query_heads=14, dtype=torch.float16)
    other = draft_case([700, 90], query_heads=14, dtype=torch.float16)
    out, workspace, export = case.out(), case.workspace(8), case.export(torch.float32)
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    export_attention(*arguments, out=out, workspace=workspace, export=export)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        export_attention(*arguments, out=out, workspace=workspace, export=export)
    for lengths in ([700, 90], [20, 3], [513, 64]):
        case.batch.lengths.copy_(torch.tensor(lengths))
        other = replace(
            other,
            lengths=lengths,
            clean_keys=[key[:n] for key, n in zip(case.clean_keys, lengths, strict=True)],
            clean_values=[value[:n] for value, n in zip(case.clean_values, lengths, strict=True)],
        )
        graph.replay()
        check(other, out, export, BOUND[torch.float16])


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_last_program_sees_all_parts():
    """Many programs that end together, many times: a part that is joined before it was written shows as NaN."""
    case = draft_case([4000, 3999, 900, 2048], query_heads=14, dtype=torch.float16)
    workspace = case.workspace(64)
    arguments = case.query, case.keys, case.values, case.batch, SCALING
    expected = export_attention_reference(*arguments, out=case.out())
    for _ in range(200):
        workspace.outputs.fill_(NAN)
        workspace.lse.fill_(NAN)
        out = export_attention(*arguments, out=case.out(), workspace=workspace)
        assert error_ratio(out, expected) < BOUND[torch.float16]
