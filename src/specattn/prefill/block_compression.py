"""One token for a block of tokens, where they are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specattn.kernels.blocks import in_blocks


@dataclass(frozen=True)
class Compressed:
    """Blocks of tokens in short.

    Attributes:
        means: float32 ``[batch, heads, blocks, head_dim]``.
        similarity: float32 ``[batch, heads, blocks]``: mean cosine similarity of a block's tokens, at most 1.
    """

    means: Tensor
    similarity: Tensor


def compress(tokens: Tensor, block: int) -> Compressed:
    """Mean and self-similarity of each block (SpargeAttn, arXiv 2502.18137, section 3.3).

    The similarity is the mean over all pairs of the block's tokens, a token with itself included:
    ``1/n^2 sum_ij x_i x_j / (|x_i| |x_j|)``, which is the squared length of the mean of the unit vectors. A token of
    zeros is like nothing.

    Args:
        tokens: ``[batch, heads, n, head_dim]``.
        block: tokens a block; the last one may have fewer.
    """
    blocks = in_blocks(tokens.float(), block)
    first = torch.arange(blocks.shape[-3], device=tokens.device) * block
    counts = (tokens.shape[-2] - first).clamp(max=block)[:, None]
    direction = normalize(blocks, dim=-1).sum(-2) / counts
    return Compressed(blocks.sum(-2) / counts, direction.square().sum(-1).clamp(max=1))
