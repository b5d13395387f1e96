"""Both stages together: exact where they must be, bounded where they may not be."""

from __future__ import annotations

import pytest
import torch
from naive_sparge import block_mask, example
from torch.nn.functional import scaled_dot_product_attention

from specattn.kernels.blocks import BlockGrid
from specattn.kernels.check import error_ratio
from specattn.kernels.int8_blocks import smooth_keys
from specattn.prefill import two_stage
from specattn.prefill.thresholds import OFF, Thresholds
from specattn.prefill.two_stage import two_stage_attention

CPU = torch.device("cpu")


def run(query, key, value, start, theta=0.4, tau=0.9, lam=OFF, int8=False, scaling=0.2):
    thresholds = Thresholds.uniform(theta, tau, lam, query.shape[1], CPU)
    return two_stage_attention(query, key, value, thresholds, start=start, scaling=scaling, int8=int8)


def visible(rows, length, start):
    row, token = torch.arange(rows)[:, None], torch.arange(length)[None]
    return torch.ones(rows, length, dtype=torch.bool) if start is None else token <= start + row


def masked(query, key, value, mask, scaling=0.2):
    """Dense attention under a boolean mask, in float64."""
    out = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out.nan_to_num(0)


@pytest.mark.parametrize("group", [1, 3, 6, 8])
@pytest.mark.parametrize("rows,length,start", [(1, 1, 0), (333, 333, 0), (129, 400, 271), (70, 197, None)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keeping_everything_is_dense_attention(group, rows, length, start, head_dim):
    query, key, value = example(rows, length, 2 * group, 2, head_dim)
    out = run(query, key, value, start, tau=1.0)
    assert error_ratio(out.out, masked(query, key, value, visible(rows, length, start))) < 1e-5
    assert (out.computed == 1).all() and (out.skipped == 0).all() and (out.sparsity == 0).all()


@pytest.mark.parametrize("rows,length,start", [(333, 333, 0), (129, 400, 271), (300, 500, None)])
def test_a_part_is_attention_over_the_papers_blocks(rows, length, start):
    query, key, value = example(rows, length)
    out = run(query, key, value, start)
    blocks = torch.stack([block_mask(query[0, h], key[0, h // 2], start, 0.4, 0.9, 0.2) for h in range(4)])
    tokens = blocks.repeat_interleave(128, 1)[:, :rows].repeat_interleave(64, 2)[..., :length]
    mask = tokens & visible(rows, length, start)
    assert error_ratio(out.out, masked(query, key, value, mask)) < 1e-5
    share = mask.sum((1, 2)) / visible(rows, length, start).sum()
    assert out.computed[0] == pytest.approx(share.double(), abs=1e-6)
    assert out.computed.min() < 1


@pytest.mark.parametrize("start", [0, 37, None])
def test_long_calls_are_the_same_in_stretches(start, monkeypatch):
    query, key, value = example(600, 600 + (start or 0))
    whole = run(query, key, value, start, lam=3.0)
    monkeypatch.setattr(two_stage, "STRETCH", 256)
    pieces = run(query, key, value, start, lam=3.0)
    assert error_ratio(pieces.out, whole.out) < 1e-6
    assert torch.equal(pieces.computed, whole.computed) and torch.equal(pieces.skipped, whole.skipped)


@pytest.mark.parametrize("int8", [False, True])
def test_chunks_of_whole_query_blocks_choose_as_one_call_does(int8):
    """Up to rounding: the mean that smoothing takes away is that of the keys there are."""
    query, key, value = example(500, 500)
    whole, exact = (run(query, key, value, 0, int8=kind) for kind in (int8, False))
    tolerance = 2 * error_ratio(whole.out, exact.out) + 1e-6
    for start, stop in ((0, 256), (256, 384), (384, 500)):
        rows = slice(start, stop)
        part = run(query[:, :, rows], key[:, :, :stop], value[:, :, :stop], start, int8=int8)
        assert error_ratio(part.out, whole.out[:, :, rows]) < tolerance


# Causality


@pytest.mark.parametrize("start", [0, 50])
def test_nothing_behind_a_query_block_and_its_last_key_block_reaches_it(start):
    query, key, value = example(400, 400 + start)
    before = run(query, key, value, start, lam=3.0)
    for end in (128, 256, 384):
        changed = [tokens.clone() for tokens in (query, key, value)]
        changed[0][:, :, end:] = 5 * torch.randn_like(changed[0][:, :, end:])
        behind = -(-(start + end) // 64) * 64
        for tokens in changed[1:]:
            tokens[:, :, behind:] = 5 * torch.randn_like(tokens[:, :, behind:])
        after = run(*changed, start, lam=3.0)
        assert error_ratio(after.out[:, :, :end], before.out[:, :, :end]) < 1e-6
        assert error_ratio(after.out[:, :, end:], before.out[:, :, end:]) > 0.1


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("row", [0, 63, 64, 129, 200])
def test_no_row_reads_a_later_value(row, int8):
    query, key, value = example(260, 310)
    before = run(query, key, value, 50, lam=3.0, int8=int8).out
    value[:, :, 50 + row + 1 :] = 1e6
    after = run(query, key, value, 50, lam=3.0, int8=int8).out
    assert error_ratio(after[:, :, : row + 1], before[:, :, : row + 1]) < 1e-6


@pytest.mark.parametrize("row", [0, 63, 64, 129, 200])
def test_no_row_reads_a_later_key(row):
    query, key, value = example(260, 310)
    before = run(query, key, value, 50, tau=1.0).out
    key[:, :, 50 + row + 1 :] = 1e3 * torch.randn_like(key[:, :, 50 + row + 1 :])
    after = run(query, key, value, 50, tau=1.0).out
    assert error_ratio(after[:, :, : row + 1], before[:, :, : row + 1]) < 1e-6


# Approximation


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("start", [0, None])
def test_the_error_of_integers_is_bounded(head_dim, start):
    """A logit moves by no more than half a scale of each factor allows, and the weights by exp of twice that."""
    query, key, value = example(300, 300, head_dim=head_dim)
    exact = masked(query, key, value, visible(300, 300, start))
    error = run(query, key, value, start, tau=1.0, int8=True).out - exact
    half = [tokens.abs().max() / 127 / 2 for tokens in (query, smooth_keys(key))]
    lengths = [tokens.abs().sum(-1).max() for tokens in (query, smooth_keys(key))]
    logit = 0.2 * (half[0] * lengths[1] + half[1] * lengths[0] + head_dim * half[0] * half[1])
    assert 0 < error.abs().max() <= torch.expm1(2 * logit) * value.abs().max()
    assert error.norm() / exact.norm() < 0.05


def test_smoothing_takes_a_common_offset_away():
    query, key, value = example(300, 300)
    exact = masked(query, key, value, visible(300, 300, 0))
    offset = key + 50 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    plain, moved = (run(query, keys, value, 0, tau=1.0, int8=True) for keys in (key, offset))
    assert error_ratio(moved.out, exact) < 1.5 * error_ratio(plain.out, exact)


def test_the_error_falls_as_tau_grows():
    query, key, value = example(640, 640, rough=0.3)
    exact = masked(query, key, value, visible(640, 640, 0))
    runs = [run(query, key, value, 0, theta=0.3, tau=tau) for tau in (0.3, 0.6, 0.9, 0.99, 1.0)]
    errors = [error_ratio(out.out, exact) for out in runs]
    shares = [float(out.computed.mean()) for out in runs]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-5
    assert shares == sorted(shares) and shares[0] < 0.7


def test_skipped_values_are_bounded_by_lam_and_counted():
    query, key, value = example(640, 640, rough=0.3)
    exact = run(query, key, value, 0, tau=1.0, scaling=1.0)
    total = BlockGrid(640, 640, 0).total
    shares = []
    for lam in (2.0, 4.0, 8.0, 16.0):
        out = run(query, key, value, 0, tau=1.0, lam=lam, scaling=1.0)
        shares.append(float(out.skipped.mean()))
        # Each skipped weight is below exp(-lam) of the largest, and there are no more than skipped products.
        bound = 2 * torch.exp(torch.tensor(-lam)) * 640 * value.abs().max()
        assert (out.out - exact.out).abs().max() <= bound
        assert torch.equal(out.sparsity, out.skipped / 2)
        assert out.skipped * total == pytest.approx((out.skipped * total).round())
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_a_lam_of_the_default_changes_nothing_visible():
    query, key, value = example(400, 400)
    off, default = (run(query, key, value, 0, lam=lam) for lam in (OFF, 50.0))
    assert error_ratio(default.out, off.out) < 1e-6
