"""Which key blocks a query block attends to, predicted from compressed blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.blocks import BlockGrid
from specattn.kernels.nucleus import nucleus
from specattn.prefill.block_compression import Compressed
from specattn.prefill.thresholds import Thresholds


def select_blocks(
    query: Compressed, key: Compressed, grid: BlockGrid, thresholds: Thresholds, scaling: float
) -> Tensor:
    """SpargeAttn's first stage (arXiv 2502.18137, section 3.3).

    A block may be compressed if its self-similarity exceeds theta. Softmax over the scores of compressible key blocks
    predicts where a query block looks; the heaviest of them with a mass of tau together are kept. What cannot be
    predicted is kept: key blocks that may not be compressed, everything for query blocks that may not, and, in causal
    attention, the blocks in which the rows' own tokens lie.

    Args:
        query: ``[batch, query_heads, query_blocks]`` blocks.
        key: ``[batch, kv_heads, key_blocks]`` blocks.

    Returns:
        bool ``[batch, query_heads, query_blocks, key_blocks]``; never a block of which nothing is visible.
    """
    device, group = query.means.device, query.means.shape[1] // key.means.shape[1]
    theta = thresholds.theta[:, None]
    alike = (key.similarity.repeat_interleave(group, 1) > theta)[:, :, None]
    predictable = (query.similarity > theta)[..., None]
    count = grid.visible(device)
    visible = torch.arange(grid.key_blocks, device=device) < count[:, None]
    scores = query.means @ key.means.repeat_interleave(group, 1).mT * scaling
    # A row without compressible blocks has no distribution; it needs none, all its blocks are kept.
    weights = scores.masked_fill(~(visible & alike), -torch.inf).softmax(-1).nan_to_num(0)
    # Query blocks lead: how much is visible depends on them alone.
    kept = nucleus(weights.movedim(2, 0), thresholds.tau, count).movedim(0, 2)
    return visible & (kept | ~alike | ~predictable | grid.diagonal(device))
