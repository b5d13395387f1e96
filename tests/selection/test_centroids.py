"""Centroids against a plain reading: for each page, the mean of the tokens that the list leaves out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from paged import SCALING, PagedRound, contents, paged_round

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.kernels.check import error_ratio
from specattn.kernels.sparse_attention import sparse_attention
from specattn.selection.base import LayerState, Selection
from specattn.selection.centroids import with_centroids
from specattn.selection.registry import parse_method
from specattn.stores.page_means import PageMeans

LAYER, ROWS, PAGE = 1, 3, 8
LENGTHS = [41, 16, 7, 30]
GEOMETRY = KVGeometry(2, 6, 2, 8, torch.float32)


def a_round(dtype: torch.dtype = torch.float32, **options) -> PagedRound:
    geometry = replace(GEOMETRY, dtype=dtype)
    return paged_round(geometry, LENGTHS, ROWS, [PageMeans(PAGE)], **options)


def some_tokens(share: float = 0.3) -> Selection:
    """A list for each head that holds the round's own tokens, and others at random."""
    length = max(LENGTHS) + ROWS
    chosen = torch.rand(len(LENGTHS), 2, length, generator=torch.Generator().manual_seed(3)) < share
    position, starts = torch.arange(length), torch.tensor(LENGTHS)[:, None, None]
    return Selection.from_mask((chosen | (position >= starts)) & (position < starts + ROWS))


def completed(round: PagedRound, selection: Selection) -> Selection:
    state = LayerState(round.state(), None, LAYER, round.queries(LAYER), SCALING, round.source)
    return with_centroids(state, selection, PageMeans(PAGE))


def plain_attention(round: PagedRound, selection: Selection) -> torch.Tensor:
    """Row by row and token by token, in float64."""
    queries = round.queries(LAYER).double()
    out = torch.zeros_like(queries)
    for request, length in enumerate(LENGTHS):
        keys, values = (x[LAYER].double() for x in contents(round.geometry, length, ROWS, round.seed))
        for row in range(ROWS):
            for head in range(GEOMETRY.query_heads):
                kv = head // GEOMETRY.group
                listed = [t for t in selection.indices[request, kv].tolist() if t >= 0]
                query = queries[request, row, head]
                parts = [(keys[kv, t], values[kv, t], 1) for t in listed if t <= length + row]
                for first in range(0, length, PAGE):
                    rest = [t for t in range(first, min(first + PAGE, length)) if t not in listed]
                    if rest:
                        parts.append((keys[kv, rest].mean(0), values[kv, rest].mean(0), len(rest)))
                weights = [count * math.exp(float(query @ key) * SCALING) for key, _, count in parts]
                total = sum(w * value for w, (_, value, _) in zip(weights, parts, strict=True))
                out[request, row, head] = total / sum(weights)
    return out


def attend(round: PagedRound, selection: Selection) -> torch.Tensor:
    keys, values = round.source.gather(LAYER, selection.indices)
    queries = round.queries(LAYER)
    return sparse_attention(queries, keys, values, selection, round.step.positions, SCALING)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_every_page_is_represented_by_what_the_list_leaves_out(share):
    round, selection = a_round(), some_tokens(share)
    assert error_ratio(attend(round, completed(round, selection)), plain_attention(round, selection)) < 1e-5


def test_half_precision_survives_the_subtraction():
    """One token left of a page: its key is 8 means less 7 keys, and is still no worse than the cache's own rounding."""
    round = a_round(torch.bfloat16)
    keep = torch.ones(len(LENGTHS), 2, max(LENGTHS) + ROWS, dtype=torch.bool)
    keep[..., 3] = False
    keep &= torch.arange(keep.shape[-1]) < torch.tensor(LENGTHS)[:, None, None] + ROWS
    pseudo = completed(round, Selection.from_mask(keep)).pseudo
    for request, length in enumerate(LENGTHS):
        for found, held in zip(
            (pseudo.keys, pseudo.values), contents(round.geometry, length, ROWS, 0), strict=True
        ):
            assert error_ratio(found[request, :, 0], held[LAYER][:, 3].float()) < 2**-8
    assert (pseudo.log_weights[..., 0] == 0).all() and (pseudo.log_weights[..., 1:] == -math.inf).all()


def test_equal_tokens_are_replaced_exactly():
    """Where all keys of a page agree, nothing is lost: sparse attention is dense attention."""
    round = a_round()
    slot, pool = int(round.step.slots[0]), round.step.cache
    rows = pool.rows(torch.tensor([slot]), torch.arange(LENGTHS[0] + ROWS)[None])[0]
    pool.keys[LAYER][rows] = pool.keys[LAYER][rows[:1]].clone()
    store = pool.stores[PageMeans(PAGE)]
    store.append(LAYER, torch.tensor([slot]), torch.arange(LENGTHS[0] + ROWS)[None], rows[None], None)
    everything = Selection.from_mask(
        torch.arange(max(LENGTHS) + ROWS).expand(len(LENGTHS), 2, -1)
        < torch.tensor(LENGTHS)[:, None, None] + ROWS
    )
    sparse = attend(round, completed(round, some_tokens()))[0]
    assert error_ratio(sparse, attend(round, everything)[0]) < 1e-5


def test_both_means_of_every_page_are_counted():
    extra = completed(a_round(), some_tokens()).extra_bytes
    pages = [math.ceil((length + ROWS) / PAGE) for length in LENGTHS]
    assert extra.tolist() == [count * 2 * 2 * GEOMETRY.head_dim * 4 for count in pages]


@pytest.mark.parametrize("rejected", [1, 9, 20])
def test_rejected_tokens_leave_no_trace_in_the_means(rejected):
    expected, found = a_round(), a_round(rejected=rejected)
    selection = some_tokens()
    assert (
        error_ratio(
            attend(found, completed(found, selection)), attend(expected, completed(expected, selection))
        )
        == 0
    )


@pytest.mark.parametrize("page", [-64, 3, 48, 8192])
def test_pages_that_are_no_power_of_two_are_refused(page):
    with pytest.raises(UsageError, match=rf"centroids={page} is no power of two up to 4096.*centroids=64"):
        parse_method(f"specattn:centroids={page}")


@pytest.mark.parametrize("sample", ["tail=0.05", "eps=0.1"])
def test_a_sample_that_stands_for_the_rest_leaves_nothing_to_centroids(sample):
    with pytest.raises(UsageError, match="centroids=64 would count what the tail stands for a second time"):
        parse_method(f"specattn:centroids=64:{sample}")


@pytest.mark.parametrize("wrapper", ["twilight", "vattention"])
def test_lists_with_centroids_cannot_be_wrapped(wrapper):
    with pytest.raises(UsageError, match="base=specattn returns no plain lists"):
        parse_method(f"{wrapper}:base=(specattn:centroids=64)")
