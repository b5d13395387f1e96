"""Attention over the paged pool against its reference: in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_case import NAN, SCALING, PagedCase, paged_case

from specattn.errors import UsageError
from specattn.kernels import tiling
from specattn.kernels.check import error_ratio
from specattn.kernels.paged_attention import dense_paged_attention, sparse_paged_attention
from specattn.kernels.paged_reference import dense_paged_attention_reference
from specattn.kernels.schedule import schedule
from specattn.kernels.tiling import Tiling, Workspace
from specattn.selection.base import Selection

CUDA = torch.cuda.is_available()
# The interpreter has no bfloat16 products; on a GPU, float32 ones would need tiles of another size.
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPE = DTYPES[0]

# rows, query heads, KV heads, channels: groups of 1, 3, 6, 8 and 16
SHAPES = [
    (1, 2, 2, 64),
    (2, 6, 2, 80),
    (5, 6, 1, 128),
    (9, 8, 1, 64),
    (1, 16, 1, 256),
    (5, 16, 1, 96),
    (9, 16, 1, 17),  # 144 query rows: two blocks
]
LENGTHS = [61, 9, 130]


def make(lengths: list[int], **options: object) -> PagedCase:
    options.setdefault("dtype", DTYPE)
    return paged_case(lengths, **options).to("cuda" if CUDA else "cpu")  # type: ignore[arg-type]


def sparse(case: PagedCase, tiling: Tiling | None = None, **options: object) -> torch.Tensor:
    options.setdefault("out", case.poisoned_out())
    options.setdefault("workspace", allocated(case, tiling))
    return sparse_paged_attention(
        case.query,
        case.keys,
        case.values,
        case.block_table,
        case.slots,
        case.selection,
        case.positions,
        SCALING,
        case.page_size,
        **options,  # type: ignore[arg-type]
    )


def dense(case: PagedCase, tiling: Tiling | None = None, **options: object) -> torch.Tensor:
    options.setdefault("out", case.poisoned_out())
    options.setdefault("workspace", allocated(case, tiling))
    return dense_paged_attention(
        case.query,
        case.keys,
        case.values,
        case.block_table,
        case.slots,
        case.lengths,
        case.positions,
        SCALING,
        case.page_size,
        **options,  # type: ignore[arg-type]
    )


def allocated(case: PagedCase, tiling: Tiling | None = None) -> Workspace:
    """Poisoned but for the counts, which a workspace promises to hold at 0."""
    batch, rows, query_heads, head_dim = case.query.shape
    workspace = Workspace.allocate(
        batch=batch,
        rows=rows,
        query_heads=query_heads,
        kv_heads=case.keys.shape[1],
        head_dim=head_dim,
        dtype=case.query.dtype,
        device=case.query.device,
        tiling=tiling,
    )
    workspace.parts.fill_(NAN)
    return workspace


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return error_ratio(out, expected) < BOUND[out.dtype]


@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_selected_tokens(rows, query_heads, kv_heads, head_dim):
    case = make(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim)
    assert close(sparse(case), case.expected())


@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", SHAPES)
def test_all_tokens(rows, query_heads, kv_heads, head_dim):
    case = make(LENGTHS, rows=rows, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, density=1)
    assert close(dense(case), case.expected())


@pytest.mark.parametrize("programs", [1, 20])
def test_sums_of_all_tokens(programs):
    """The logarithms are those of the reference, whether one program or several share a request."""
    case = make(LENGTHS, rows=5, query_heads=6, kv_heads=2, head_dim=64, density=1)
    found, wanted = (torch.full(case.query.shape[:3], NAN, device=case.query.device) for _ in range(2))
    out = dense(case, lse=found, tiling=Tiling(tokens=16, programs=programs))
    pool = (case.keys, case.values, case.block_table, case.slots, case.lengths, case.positions)
    reference = dense_paged_attention_reference(case.query, *pool, SCALING, case.page_size, lse=wanted)
    assert close(out, reference) and error_ratio(found, wanted) < BOUND[DTYPE]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 3, 20])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_division_of_ragged_lists_among_programs(dtype, programs, weighted):
    case = make([200, 1, 2, 70, 40], rows=1, kv_heads=2, head_dim=16, weighted=weighted, dtype=dtype)
    assert close(sparse(case, tiling=Tiling(tokens=16, programs=programs)), case.expected())


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_other_pages(page_size):
    case = make(LENGTHS, page_size=page_size)
    assert close(sparse(case), case.expected())
    full = make(LENGTHS, page_size=page_size, density=1)
    assert close(dense(full), full.expected())


@pytest.mark.parametrize(
    "tiling",
    [Tiling(tokens=32, rows=64), Tiling(tokens=128, warps=8, stages=2), Tiling(tokens=16, programs=7)],
)
def test_other_tiles(tiling):
    case = make(LENGTHS, rows=5, weighted=True)
    assert close(sparse(case, tiling=tiling), case.expected())


def test_two_blocks_of_query_rows_divided_among_programs():
    case = make([70], rows=9, query_heads=16, head_dim=16)
    assert close(sparse(case, tiling=Tiling(tokens=16, warps=8, programs=3)), case.expected())


def test_more_parts_than_are_taken_at_once(monkeypatch):
    monkeypatch.setattr(tiling, "MOST_PARTS", 2)
    case = make([20, 90, 5, 40, 130], rows=1, query_heads=2, kv_heads=2, head_dim=16)
    assert close(sparse(case, tiling=Tiling(tokens=16, programs=17)), case.expected())


def test_an_empty_list_gives_zeros_and_leaves_the_others_alone():
    case = make([90, 50, 70], kv_heads=2)
    mask = case.selection.to_mask(90)
    mask[1, 0] = False
    mask[2] = False
    case = replace(case, selection=Selection.from_mask(mask))
    out = sparse(case, tiling=Tiling(tokens=16, programs=4))
    assert close(out, case.expected())
    assert (out[1, :, 0] == 0).all() and (out[2] == 0).all()


def test_a_row_that_sees_none_of_its_list_gives_zeros():
    case = make([90], rows=3)
    mask = torch.zeros_like(case.selection.to_mask(90))
    mask[..., -2:] = True
    case = replace(case, selection=Selection.from_mask(mask))
    out = sparse(case)
    assert (out[0, 0] == 0).all()
    assert close(out, case.expected())


def test_padding_of_the_batch_is_harmless():
    case = make([90, 0, 33], rows=2, density=1)
    assert int(case.block_table[case.slots[1]].sum()) == 0
    out = dense(case, tiling=Tiling(tokens=16, programs=5))
    assert close(out, case.expected())
    assert (out[1] == 0).all()
    # What an earlier request left in the lists of a padded slot: page 0 is read, and is NaN here.
    stale = replace(case.selection, counts=case.selection.counts.clamp(min=30))
    stale.indices[1] = stale.indices[0]
    out = sparse(replace(case, selection=stale), tiling=Tiling(tokens=16, programs=5))
    assert close(out[[0, 2]], case.expected()[[0, 2]])


def test_nothing_behind_the_counts_is_looked_at():
    case = make(LENGTHS, weighted=True)
    expected = case.expected()
    beyond = case.selection.indices < 0
    case.selection.indices[beyond] = 2**30
    assert beyond.any()
    assert close(sparse(case), expected)


def test_heads_and_requests_may_share_a_list():
    case = make([70, 70], query_heads=4, kv_heads=2, density=1)
    shared = torch.arange(0, 70, 3, dtype=torch.int32, device=case.query.device)
    counts = torch.full((1, 1), len(shared), dtype=torch.int32, device=case.query.device)
    case = replace(case, selection=Selection(shared.expand(2, 2, -1), counts.expand(2, 2)))
    assert close(sparse(case), case.expected())


def test_queries_as_transformers_lays_them_out():
    case = make(LENGTHS, query_heads=6, kv_heads=2)
    strided = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert close(sparse(replace(case, query=strided)), case.expected())


def test_makes_its_own_output():
    case = make(LENGTHS)
    assert close(sparse(case, out=None), case.expected())


def test_a_workspace_is_reused_whatever_its_parts_hold():
    tiling = Tiling(tokens=16, programs=6)
    more, fewer = (make(LENGTHS, rows=rows, density=1, seed=rows) for rows in (4, 2))
    workspace = allocated(more, tiling)
    for case in (more, fewer, more):
        assert close(sparse(case, workspace=workspace), case.expected())
        assert close(dense(case, workspace=workspace), case.expected())
        assert (workspace.arrivals == 0).all()


@pytest.mark.parametrize("other", [{"rows": 17}, {"query_heads": 4, "kv_heads": 4}, {"head_dim": 128}])
def test_a_workspace_for_other_shapes_is_refused(other):
    case = make(LENGTHS, rows=2, query_heads=4, kv_heads=2)
    larger = make(LENGTHS, **({"rows": 2, "query_heads": 4, "kv_heads": 2} | other))
    with pytest.raises(UsageError, match="do not fit a workspace for"):
        sparse(larger, workspace=allocated(case))


def test_a_schedule_for_longer_lists_serves_these_too():
    case = make(LENGTHS, rows=1, kv_heads=2, query_heads=2)
    workspace = allocated(case, Tiling(tokens=16, programs=9))
    longer = torch.stack([case.selection.counts, case.selection.counts + 40], 1)
    of_layers = schedule(longer, workspace, listed=True)
    for layer in range(2):
        out = sparse(case, workspace=workspace, schedule=of_layers.of_layer(layer))
        assert close(out, case.expected())


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: {"query": c.query[..., :32]}, "32 channels .* of 64"),
        (lambda c: {"query": c.query[:, :, :1], "keys": c.keys.expand(-1, 2, -1)}, "must be a multiple"),
        (lambda c: {"query": c.query.double()}, "float64.* convert the query"),
        (lambda c: {"values": c.values[1:]}, "must be alike"),
        (
            lambda c: {"keys": c.keys[..., ::2], "values": c.values[..., ::2], "query": c.query[..., ::2]},
            "contiguous",
        ),
        (lambda c: {"slots": c.slots[1:]}, r"slots has shape \[2\]: \[3\] is needed"),
        (lambda c: {"positions": c.positions[:, :1]}, r"positions has shape \[3, 1\]: \[3, 2\] is needed"),
        (lambda c: {"selection": replace(c.selection, counts=c.selection.counts[:2])}, "indices have shape"),
        (
            lambda c: {"selection": replace(c.selection, log_weights=torch.zeros(3, 1, 7))},
            "log_weights have shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = make(LENGTHS)
    with pytest.raises(UsageError, match=message):
        sparse(replace(case, **change(case)))


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_its_inputs():
    case = make(LENGTHS, rows=5, query_heads=8, kv_heads=2, head_dim=128, density=1)
    outs = [case.poisoned_out(), case.poisoned_out()]
    sparse(case, out=outs[0])  # compiles
    dense(case, out=outs[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse(case, out=outs[0])
        dense(case, out=outs[1])
    case.lengths[1] -= 3
    case.positions[1] -= 3
    everything = case.expected()
    mask = case.selection.to_mask(max(LENGTHS))
    fewer = Selection.from_mask(mask & (torch.rand(mask.shape, device=mask.device) < 0.3))
    case.selection.indices.copy_(fewer.indices)
    case.selection.counts.copy_(fewer.counts)
    for out in outs:
        out.fill_(NAN)
    graph.replay()
    assert close(outs[0], case.expected())
    assert close(outs[1], everything)
