"""Scores of pages against a plain reading, channel by channel: in Triton's interpreter, and on the GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from draft_case import BOUND, DEVICE, DTYPES, NAN
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels import page_scores as module
from specattn.kernels.check import error_ratio
from specattn.kernels.page_scores import page_scores, page_scores_reference, runs_on

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

BOTH = pytest.mark.parametrize("score", [page_scores, page_scores_reference])
# rows, query heads, KV heads, channels: groups of 1, 3, 7 and 8
SHAPES = [(1, 2, 2, 64), (5, 6, 2, 80), (2, 14, 2, 128), (9, 8, 1, 8), (1, 6, 1, 256)]
SCALING = 0.21


def case(
    rows: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    filled: tuple[int, ...] = (70, 3, 0, 64),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Requests whose pages lie anywhere; bounds that no request may look at are NaN. As the store holds bounds."""
    generator = torch.Generator().manual_seed(rows + head_dim)
    pages = max(filled) + 2
    entries = torch.randperm(len(filled) * pages, generator=generator).view(len(filled), pages)
    bounds = torch.full((len(filled) * pages, 2, kv_heads, head_dim), NAN)
    for request, count in enumerate(filled):
        pair = torch.randn(count, 2, kv_heads, head_dim, generator=generator).sort(1).values
        bounds[entries[request, :count]] = pair
    query = torch.randn(len(filled), rows, query_heads, head_dim, generator=generator)
    lower, upper = bounds.to(DEVICE, dtype).unbind(1)
    counts = torch.tensor(filled, dtype=torch.int32, device=DEVICE)
    return query.to(DEVICE, dtype), lower, upper, entries.to(DEVICE), counts


def naive(query: Tensor, lower: Tensor, upper: Tensor, entries: Tensor, filled: Tensor) -> Tensor:
    """The larger of two products in each channel, in float64; minus infinity where nothing is scored."""
    batch, rows, query_heads, _ = query.shape
    kv_heads = lower.shape[1]
    group = query_heads // kv_heads
    out = torch.full((batch, kv_heads, rows, group, entries.shape[1]), -torch.inf, dtype=torch.float64)
    for request, count in enumerate(filled.tolist()):
        for head in range(query_heads):
            kv, member = divmod(head, group)
            low, high = (bound[entries[request, :count], kv].double() for bound in (lower, upper))
            for row in range(rows):
                q = query[request, row, head].double()
                best = torch.maximum(q * low, q * high).sum(-1) * SCALING
                out[request, kv, row, member, :count] = best.cpu()
    return out


def check(score: Any, arguments: tuple[Tensor, ...], bound: float) -> None:
    found, expected = score(*arguments, SCALING).cpu(), naive(*arguments)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found.isneginf(), expected.isneginf())
    assert error_ratio(found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0)) < bound


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_by_definition(score, shape):
    check(score, case(*shape), BOUND[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_halves_are_multiplied_exactly(dtype):
    check(page_scores, case(5, 32, 8, 128, (130, 20), dtype), BOUND[torch.float32])


def test_unwritten_scores_would_be_found(monkeypatch):
    """What is returned was made with NaN in it."""
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(NAN))
    check(page_scores, case(2, 6, 2, 64, (65, 1)), BOUND[torch.float32])


def test_what_does_not_fit_is_refused():
    query, lower, upper, entries, filled = case(2, 6, 2, 64, (5, 1))
    refusals: list[tuple[str, tuple[Tensor, ...]]] = [
        ("upper has shape", (query, lower, upper[1:], entries, filled)),
        ("filled has shape", (query, lower, upper, entries, filled[1:])),
        ("bounds torch.float64", (query, lower.double(), upper.double(), entries, filled)),
        ("both must be alike", (query, lower.contiguous(), upper, entries, filled)),
        ("from 1 to 128 fit", (query.repeat(1, 30, 1, 1), lower, upper, entries, filled)),
        ("up to 256 channels", (query.repeat(1, 1, 1, 5), lower, upper, entries, filled)),
    ]
    for message, arguments in refusals:
        with pytest.raises(UsageError, match=message):
            page_scores(*arguments, SCALING)


def test_where_the_kernel_runs(monkeypatch):
    query = case(2, 6, 2, 64)[0]
    assert not runs_on(query.cpu(), 2)
    monkeypatch.setattr(module, "has_kernels", lambda device: True)
    assert runs_on(query, 2)
    assert not runs_on(query.repeat(1, 30, 1, 1), 2) and not runs_on(query.repeat(1, 1, 1, 5), 2)
