"""Compression and the choice of blocks, against the paper read with loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from naive_sparge import block_mask, blocks_of, example, self_similarity

from specattn.kernels.blocks import BlockGrid
from specattn.prefill.block_compression import compress
from specattn.prefill.block_selection import select_blocks
from specattn.prefill.thresholds import OFF, Thresholds

CPU = torch.device("cpu")


def select(query, key, start, theta, tau, scaling=0.25):
    grid = BlockGrid(query.shape[2], key.shape[2], start)
    thresholds = Thresholds.uniform(theta, tau, OFF, query.shape[1], CPU)
    return select_blocks(compress(query, 128), compress(key, 64), grid, thresholds, scaling)


@pytest.mark.parametrize("length,block", [(1, 64), (64, 64), (97, 64), (130, 128), (5, 2)])
def test_means_and_self_similarity(length, block):
    tokens = torch.randn(2, 3, length, 16, generator=torch.Generator().manual_seed(length)) + 0.7
    short = compress(tokens, block)
    for b in range(2):
        for h in range(3):
            for number, part in enumerate(blocks_of(tokens[b, h], block)):
                assert torch.allclose(short.means[b, h, number].double(), part.mean(0), atol=1e-5)
                assert float(short.similarity[b, h, number]) == pytest.approx(self_similarity(part), abs=1e-5)
    assert short.similarity.shape == (2, 3, -(-length // block))


def test_extremes_of_self_similarity():
    same = torch.randn(16).expand(1, 1, 70, 16)
    assert compress(same, 64).similarity == pytest.approx(torch.ones(1, 1, 2), abs=1e-5)
    assert compress(same, 64).similarity.max() <= 1
    opposite = same * torch.tensor([1.0, -1.0]).repeat(35)[:, None]
    assert compress(opposite, 64).similarity.abs().max() < 1e-5
    assert compress(torch.zeros(1, 1, 64, 16), 64).similarity.item() == 0


@pytest.mark.parametrize(
    "rows,length,start", [(400, 400, 0), (130, 393, 263), (128, 320, 192), (1, 257, 256)]
)
@pytest.mark.parametrize("theta,tau", [(0.3, 0.8), (0.5, 0.9), (0.6, 0.5)])
def test_the_choice_is_the_papers(rows, length, start, theta, tau):
    query, key, _ = example(rows, length)
    mask = select(query, key, start, theta, tau)
    assert mask.shape == (1, 4, -(-rows // 128), -(-length // 64))
    for head in range(4):
        expected = block_mask(query[0, head], key[0, head // 2], start, theta, tau, 0.25)
        assert torch.equal(mask[0, head], expected), head


def test_without_a_causal_mask_lengths_may_differ():
    query, key, _ = example(300, 500)
    mask = select(query, key, None, 0.4, 0.8)
    for head in range(4):
        assert torch.equal(mask[0, head], block_mask(query[0, head], key[0, head // 2], None, 0.4, 0.8, 0.25))
    assert 0 < mask.float().mean() < 1


def test_what_the_example_exercises():
    """The inputs above have blocks that may be compressed and blocks that may not, of both kinds."""
    query, key, _ = example(400, 400)
    for tokens, block in ((query, 128), (key, 64)):
        alike = compress(tokens, block).similarity > 0.5
        assert alike.any() and not alike.all()


@pytest.mark.parametrize("theta,tau", [(0.3, 1.0), (1.0, 0.5)])
def test_tau_of_one_or_nothing_compressible_keeps_all_that_is_visible(theta, tau):
    query, key, _ = example(300, 450)
    mask, grid = select(query, key, 150, theta, tau), BlockGrid(300, 450, 150)
    assert torch.equal(mask[0, 0], grid.products(CPU) > 0)
    assert (mask == mask[:, :1]).all()


def test_a_larger_tau_keeps_what_a_smaller_one_keeps():
    query, key, _ = example(384, 640)
    masks = [select(query, key, 256, 0.4, tau) for tau in (0.3, 0.6, 0.9, 0.99)]
    for smaller, larger in pairwise(masks):
        assert (larger | ~smaller).all()
    assert masks[0].sum() < masks[-1].sum()


def test_every_head_has_its_own_thresholds():
    query, key, _ = example(384, 640)
    theta, tau = torch.tensor([0.2, 0.5, 0.9, 0.4]), torch.tensor([0.5, 0.9, 0.5, 1.0])
    grid = BlockGrid(384, 640, 256)
    mask = select_blocks(
        compress(query, 128), compress(key, 64), grid, Thresholds(theta, tau, torch.full((4,), OFF)), 0.25
    )
    for head in range(4):
        alone = select(query, key, 256, float(theta[head]), float(tau[head]))
        assert torch.equal(mask[:, head], alone[:, head])
