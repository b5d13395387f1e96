"""Bytes read, against a count by hand."""

from __future__ import annotations

import torch

from specattn.accounting import ReadMeter, read_fractions
from specattn.geometry import KVGeometry
from specattn.selection.base import Selection

GEOMETRY = KVGeometry(layers=3, query_heads=4, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
ROW = 2 * 8 * 2
SLOTS, POSITIONS = torch.tensor([2, 0]), torch.tensor([[7, 8, 9], [3, 4, 5]])


def meter() -> ReadMeter:
    return ReadMeter(GEOMETRY, slots=3, device="cpu")


def test_dense_layers_read_what_their_last_row_sees():
    one = meter()
    one.add_dense(SLOTS, POSITIONS, None)
    assert one.read.tolist() == one.full.tolist() == [6 * 2 * ROW, 0, 10 * 2 * ROW]


def test_evicted_tokens_count_in_full_only_and_scores_are_read():
    one = meter()
    one.add_dense(SLOTS, POSITIONS, None, POSITIONS + torch.tensor([[5], [0]]))
    assert one.read.tolist() == [6 * 2 * ROW, 0, 10 * 2 * ROW]
    assert one.full.tolist() == [6 * 2 * ROW, 0, 15 * 2 * ROW]
    one.add_scores(SLOTS, POSITIONS)
    assert one.read.tolist() == [6 * 2 * (ROW + 4), 0, 10 * 2 * (ROW + 4)]
    assert one.full.tolist() == [6 * 2 * ROW, 0, 15 * 2 * ROW]


def test_a_window_counts_the_union_of_its_rows_windows():
    one = meter()
    one.add_dense(SLOTS, POSITIONS, 4)
    # Three rows with windows of four tokens see six tokens together.
    assert one.read.tolist() == one.full.tolist() == [6 * 2 * ROW, 0, 6 * 2 * ROW]


def test_a_list_counts_once_for_all_rows_and_choosing_it_counts_too():
    one = meter()
    mask = torch.zeros(2, 2, 10, dtype=torch.bool)
    mask[0, 0, :3] = mask[0, 1, :5] = mask[1, 0, :2] = mask[1, 1, 1:2] = True
    chosen = Selection.from_mask(mask)
    extra = torch.tensor([100.0, 7.0], dtype=torch.float64)
    one.add_selection(SLOTS, POSITIONS, Selection(chosen.indices, chosen.counts, extra_bytes=extra))
    assert one.read.tolist() == [3 * ROW + 7, 0, 8 * ROW + 100]
    assert one.full.tolist() == [6 * 2 * ROW, 0, 10 * 2 * ROW]


def test_fractions_are_over_the_targets_full_read_and_a_new_request_starts_at_zero():
    target, draft = meter(), meter()
    target.add_selection(SLOTS, POSITIONS, Selection.from_mask(torch.ones(2, 2, 3, dtype=torch.bool)))
    draft.add_dense(SLOTS, POSITIONS, None)
    assert read_fractions(target, draft, 2) == (0.3, 1.0)
    assert read_fractions(target, None, 0) == (0.5, 0.0)
    assert read_fractions(target, draft, 1) == (0.0, 0.0)
    target.reset(2)
    assert read_fractions(target, draft, 2) == (0.0, 0.0)


def test_keys_alone_are_half_of_what_is_read_or_as_many_bytes_as_a_copy_has():
    one = meter()
    one.add_keys(SLOTS, torch.tensor([10, 6]))
    assert one.read.tolist() == [6 * 3 * 2 * ROW / 2, 0, 10 * 3 * 2 * ROW / 2]
    one = meter()
    one.add_keys(SLOTS, torch.tensor([10, 6]), 5, heads=torch.tensor([4, 1]))
    assert one.read.tolist() == [6 * 5, 0, 4 * 10 * 5]
    assert one.full.tolist() == [0, 0, 0]
