"""Attention over lists of quantised keys: the kernel against its reference, interpreted or on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from draft_case import BOUND, DEVICE, DTYPES, NAN, DraftCase, draft_case
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels import listed_attention as module
from specattn.kernels.check import error_ratio
from specattn.kernels.listed_attention import listed_attention, listed_attention_reference, runs_on
from specattn.kernels.quantised_keys import QuantisedKeys, quantise_keys_reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton", allow_module_level=True)

SCALING = 0.21


def lists(case: DraftCase, bits: int, density: float = 0.4) -> tuple[QuantisedKeys, Tensor, Tensor]:
    """Random lists, and a copy of what each head lists, where all else is NaN."""
    generator = torch.Generator().manual_seed(3)
    own, kv_heads = case.query.shape[1], case.keys.shape[1]
    copy, full = (QuantisedKeys.empty(case.keys, bits) for _ in range(2))
    copy.codes.fill_(77)
    copy.ranges.fill_(NAN)
    shape = (len(case.lengths), kv_heads, max(case.lengths) + 3)
    rows, counts = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[:2], dtype=torch.int32)
    for request, length in enumerate(case.lengths):
        at = case.batch.visible_rows(request)
        quantise_keys_reference(case.keys, at, full)
        for head in range(kv_heads):
            chosen = torch.rand(length, generator=generator) < density
            chosen[length - min(own, length) :] = True
            listed = at[chosen.to(DEVICE)]
            rows[request, head, : len(listed)] = listed.cpu()
            counts[request, head] = len(listed)
            copy.codes[head, listed] = full.codes[head, listed]
            copy.ranges[head, listed] = full.ranges[head, listed]
    return copy, rows.to(DEVICE), counts.to(DEVICE)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows,query_heads,kv_heads,head_dim", [(1, 2, 2, 64), (5, 6, 2, 32), (9, 8, 1, 64)])
def test_equals_the_reference(bits, rows, query_heads, kv_heads, head_dim):
    shape = {"rows": rows, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = draft_case([150, 9, 0, 16], **shape)
    copy, listed, counts = lists(case, bits)
    found = listed_attention(case.query, copy, listed, counts, SCALING)
    expected = listed_attention_reference(case.query, copy, listed, counts, SCALING)
    assert found.shape == expected.shape == (4, kv_heads, rows, query_heads // kv_heads, 153)
    assert error_ratio(found, expected) < BOUND[torch.float32]
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_queries_of_16_bits(dtype):
    case = draft_case([70, 33], rows=3, query_heads=14, dtype=dtype)
    copy, listed, counts = lists(case, 4)
    found = listed_attention(case.query, copy, listed, counts, SCALING)
    expected = listed_attention_reference(case.query, copy, listed, counts, SCALING)
    assert error_ratio(found, expected) < BOUND[torch.float32]


def test_the_reference_by_definition():
    """Row by row: softmax over the listed tokens up to the row's own."""
    case = draft_case([40], rows=2, query_heads=4, kv_heads=2)
    copy, rows, counts = lists(case, 4)
    found = listed_attention_reference(case.query, copy, rows, counts, SCALING)
    for head, row in ((0, 0), (1, 1), (3, 0)):
        kv, member = divmod(head, 2)
        seen = int(counts[0, kv]) - 1 + row
        keys = copy.dequantise(rows[0, kv, :seen])[:, kv].double()
        expected = (keys @ case.query[0, row, head].double() * SCALING).softmax(0)
        assert error_ratio(found[0, kv, row, member, :seen], expected) < BOUND[torch.float32]
        assert (found[0, kv, row, member, seen:] == 0).all()


def test_what_the_kernel_takes(monkeypatch):
    case = draft_case([40], rows=2)
    copy = QuantisedKeys.empty(case.keys, 4)
    monkeypatch.setattr(module, "has_kernels", lambda device: False)
    assert not runs_on(case.query, copy)
    monkeypatch.setattr(module, "has_kernels", lambda device: True)
    assert runs_on(case.query, copy)
    assert not runs_on(case.query.repeat(1, 30, 1, 1), copy)
    assert not runs_on(case.query, QuantisedKeys.empty(case.keys, 2))
    assert not runs_on(case.query[..., :24], QuantisedKeys.empty(case.keys[..., :24], 4))
    with pytest.raises(UsageError, match="from 1 to 128 fit"):
        listed_attention(case.query.repeat(1, 30, 1, 1), *lists(case, 4), SCALING)
