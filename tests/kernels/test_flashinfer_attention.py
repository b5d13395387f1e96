"""FlashInfer behind the seam of the paged kernels, with a stand-in for the package."""

from __future__ import annotations

from dataclasses import replace

import fake_flashinfer
import pytest
import torch
from paged_case import SCALING, PagedCase, paged_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels import flashinfer_attention
from specattn.kernels.check import error_ratio
from specattn.kernels.flashinfer_attention import FlashInferAttention

CPU = torch.device("cpu")
LENGTHS = [70, 16, 9, 33]
SHAPES = [(1, 2, 2), (1, 6, 2), (5, 6, 1), (3, 8, 4)]


@pytest.fixture
def plans(monkeypatch) -> list[str]:
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 16)
    return fake_flashinfer.install(monkeypatch).plans


def case(rows: int, query_heads: int, kv_heads: int, density: float) -> PagedCase:
    shape = {"rows": rows, "query_heads": query_heads, "kv_heads": kv_heads}
    return paged_case(LENGTHS, **shape, density=density)


def pool(case: PagedCase) -> tuple[Tensor, ...]:
    return case.query, case.keys, case.values, case.block_table, case.slots


@pytest.mark.parametrize("rows,query_heads,kv_heads", SHAPES)
def test_dense(plans, rows, query_heads, kv_heads):
    paged = case(rows, query_heads, kv_heads, density=1.0)
    attention = FlashInferAttention(CPU)
    where = (paged.lengths, paged.positions, SCALING, paged.page_size)
    out = paged.poisoned_out()
    found = attention.dense(*pool(paged), *where, out=out, workspace=None, tiling=None)
    assert found is out and error_ratio(found, paged.expected()) < 1e-5
    assert plans == ["Decode" if rows == 1 else "Prefill"]


@pytest.mark.parametrize("rows,query_heads,kv_heads", SHAPES)
def test_lists(plans, rows, query_heads, kv_heads):
    paged = case(rows, query_heads, kv_heads, density=0.4)
    found = FlashInferAttention(CPU).sparse(
        *pool(paged), paged.selection, paged.positions, SCALING, paged.page_size
    )
    assert error_ratio(found, paged.expected()) < 1e-5
    assert plans == ["Decode" if rows == 1 else "Prefill"]


def test_dense_layers_share_a_plan_and_rounds_do_not(plans):
    paged = case(3, 4, 2, density=1.0)
    attention = FlashInferAttention(CPU)
    where = (paged.positions, SCALING, paged.page_size)
    for _ in range(3):
        attention.dense(*pool(paged), paged.lengths, *where)
    assert len(plans) == 1
    shorter = torch.tensor([40, 16, 5, 20], dtype=torch.int32)
    found = attention.dense(*pool(paged), shorter, *where)
    assert len(plans) == 2
    full = replace(paged.selection, counts=shorter[:, None].expand(-1, 2))
    positions = shorter[:, None] - 3 + torch.arange(3)
    indices = paged.selection.indices.masked_fill(paged.selection.indices >= shorter[:, None, None], -1)
    expected = replace(paged, selection=replace(full, indices=indices), positions=positions).expected()
    assert error_ratio(found, expected) < 1e-5


def test_weights_are_refused(plans):
    paged = paged_case([20], weighted=True)
    with pytest.raises(UsageError, match="no log-weights"):
        FlashInferAttention(CPU).sparse(
            *pool(paged), paged.selection, paged.positions, SCALING, paged.page_size
        )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(flashinfer_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'specattn\[flashinfer\]'"):
        FlashInferAttention(CPU)
