"""Dense and sparse attention against a float64 reading of the definition, on odd shapes."""

from __future__ import annotations

import itertools

import pytest
import torch

from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import attention_probabilities, dense_attention, weighted_values
from specattn.kernels.sparse_attention import sparse_attention, trim
from specattn.selection.base import Selection

HEADS = [(2, 2), (6, 2), (12, 2), (8, 1)]


def exact(query, key, value, visible, scaling, log_weights=None):
    """Row by row, head by head in float64: ``visible`` ``[rows, length]``; ``log_weights`` ``[kv_heads, length]``."""
    rows, query_heads, _ = query.shape
    group = query_heads // key.shape[1]
    out = torch.full(query.shape, float("nan"), dtype=torch.float64)
    for row, head in itertools.product(range(rows), range(query_heads)):
        kv = head // group
        logits = key[:, kv].double() @ query[row, head].double() * scaling
        if log_weights is not None:
            logits = logits + log_weights[kv].double()
        weights = logits.masked_fill(~visible[row], float("-inf")).softmax(0)
        out[row, head] = weights @ value[:, kv].double()
    return out


def causal(rows, length, start, window=None):
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        low = 0 if window is None else max(0, start + row - window + 1)
        mask[row, low : start + row + 1] = True
    return mask


def split(key, value, cuts):
    edges = [0, *cuts, key.shape[0]]
    return [(key[a:b], value[a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("query_heads,kv_heads", HEADS)
@pytest.mark.parametrize("rows,start", [(1, 0), (1, 36), (5, 32), (7, 0), (37, 0)])
@pytest.mark.parametrize("cuts", [(), (1,), (4, 5, 20)])
@pytest.mark.parametrize("window", [None, 3])
def test_dense_attention(query_heads, kv_heads, rows, start, cuts, window):
    torch.manual_seed(rows + start)
    length = start + rows
    query, key = torch.randn(rows, query_heads, 16), torch.randn(length, kv_heads, 16)
    value = torch.randn(length, kv_heads, 16)
    segments = split(key, value, [cut for cut in cuts if cut < length])
    out = dense_attention(query, segments, start, 0, 0.3, window)
    assert error_ratio(out, exact(query, key, value, causal(rows, length, start, window), 0.3)) < 1e-5


@pytest.mark.parametrize("rows,start", [(70, 0), (70, 30)])
def test_a_prefill_over_scattered_pages(rows, start):
    torch.manual_seed(2)
    length = start + rows
    query, key, value = torch.randn(rows, 4, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    out = dense_attention(query, split(key, value, [16, 48]), start, 0, 0.4)
    assert error_ratio(out, exact(query, key, value, causal(rows, length, start), 0.4)) < 1e-5


def test_a_sliding_window_reads_only_what_it_is_given():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    whole = dense_attention(query, [(key, value)], 17, 0, 1.0, 6)
    tail = dense_attention(query, [(key[12:], value[12:])], 17, 12, 1.0, 6)
    assert error_ratio(tail, whole) < 1e-5


@pytest.mark.parametrize("window", [None, 4])
def test_probabilities_are_those_of_dense_attention(window):
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 6, 8), torch.randn(21, 2, 8), torch.randn(21, 2, 8)
    segments = split(key, value, [9])
    probabilities = attention_probabilities(query, segments, 18, 0, 0.4, window)
    assert probabilities.shape == (6, 3, 21)
    assert torch.allclose(probabilities.sum(-1), torch.ones(6, 3))
    assert (probabilities.transpose(0, 1)[~causal(3, 21, 18, window)[:, None].expand(3, 6, 21)] == 0).all()
    out = weighted_values(probabilities, segments)
    assert error_ratio(out, dense_attention(query, [(key, value)], 18, 0, 0.4, window)) < 1e-5


def random_selection(batch, kv_heads, lengths, generator):
    mask = torch.rand(batch, kv_heads, max(lengths), generator=generator) < 0.4
    for request, length in enumerate(lengths):
        mask[request, :, length - 5 :] = True
        mask[request, :, length:] = False
    return mask


@pytest.mark.parametrize("query_heads,kv_heads", HEADS)
@pytest.mark.parametrize("head_dim", [8, 17, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_sparse_attention_over_ragged_lists(query_heads, kv_heads, head_dim, weighted):
    generator = torch.Generator().manual_seed(head_dim)
    lengths, rows, batch = [23, 9, 40], 5, 3
    query = torch.randn(batch, rows, query_heads, head_dim, generator=generator)
    key, value = torch.randn(2, batch, max(lengths), kv_heads, head_dim, generator=generator)
    mask = random_selection(batch, kv_heads, lengths, generator)
    positions = torch.tensor([[length - rows + row for row in range(rows)] for length in lengths])
    selection = trim(Selection.from_mask(mask))
    weights = torch.randn(batch, kv_heads, max(lengths), generator=generator)
    columns = selection.indices.clamp(min=0).long()
    if weighted:
        selection = Selection(selection.indices, selection.counts, weights.gather(2, columns))
    at = columns[..., None].expand(-1, -1, -1, head_dim)
    # Padding of the lists reads poison: it must not reach the output.
    poison = (selection.indices < 0)[..., None]
    keys = key.transpose(1, 2).gather(2, at).masked_fill(poison, 1e4)
    values = value.transpose(1, 2).gather(2, at).masked_fill(poison, 1e4)
    out = sparse_attention(query, keys, values, selection, positions, 0.5)
    for request, length in enumerate(lengths):
        for head in range(kv_heads):
            heads = slice(head * (query_heads // kv_heads), (head + 1) * (query_heads // kv_heads))
            visible = causal(rows, max(lengths), length - rows) & mask[request, head]
            expected = exact(
                query[request, :, heads],
                key[request, :, head : head + 1],
                value[request, :, head : head + 1],
                visible,
                0.5,
                weights[request, head : head + 1] if weighted else None,
            )
            assert error_ratio(out[request, :, heads], expected) < 1e-5


def test_a_full_selection_is_dense_attention():
    torch.manual_seed(3)
    query, key, value = torch.randn(1, 5, 6, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    selection = Selection.from_mask(torch.ones(1, 2, 30, dtype=torch.bool))
    keys, values = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    out = sparse_attention(query, keys, values, selection, torch.arange(25, 30)[None], 0.3)
    assert error_ratio(out[0], dense_attention(query[0], [(key, value)], 25, 0, 0.3)) < 1e-5


def test_error_ratio_accepts_no_nan():
    reference = torch.ones(3)
    assert error_ratio(reference, reference) == 0
    assert not error_ratio(torch.tensor([1.0, float("nan"), 1.0]), reference) < 1e9
    assert not error_ratio(reference, torch.tensor([1.0, float("nan"), 1.0])) < 1e9
