"""The three patterns of MInference (arXiv 2407.02490, section 3): A-shape, vertical-slash and block-sparse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specattn.kernels.blocks import BlockGrid
from specattn.kernels.line_attention import Lines
from specattn.kernels.nucleus import top_k
from specattn.prefill.patterns import BlockPattern, LinePattern

A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE = "a-shape", "vertical-slash", "block-sparse"
KINDS = (A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE)


class Sizes(NamedTuple):
    """How large the pattern of each head is: int64 ``[heads]`` each. What a kind has no use for is not read.

    Attributes:
        vertical: vertical lines; in an A-shape the first tokens.
        slash: slash lines; in an A-shape the window.
        blocks: key blocks of each query block.
    """

    vertical: Tensor
    slash: Tensor
    blocks: Tensor


def a_shape(sizes: Sizes, *, length: int, block: int) -> LinePattern:
    """The first tokens and the nearest ones, whatever the text."""
    position = torch.arange(length, device=sizes.slash.device)
    return LinePattern(Lines(position < sizes.vertical[:, None], position < sizes.slash[:, None]), block)


def vertical_slash(
    scores: tuple[Tensor, Tensor], sizes: Sizes, *, sink: int, window: int, block: int
) -> LinePattern:
    """The heaviest keys and the heaviest distances.

    Args:
        scores: by key and by distance, ``[heads, length]`` each.
        sink, window: first keys and nearest distances that are always among them.
    """
    lengths = torch.tensor([scores[0].shape[-1]], device=sizes.slash.device)
    verticals = top_k(scores[0][None], sizes.vertical, lengths, sink=sink)[0]
    slashes = top_k(scores[1][None], sizes.slash, lengths, sink=window)[0]
    return LinePattern(Lines(verticals, slashes), block)


def block_sparse(scores: Tensor, sizes: Sizes, grid: BlockGrid) -> BlockPattern:
    """The heaviest key blocks of each query block, its own among them.

    Args:
        scores: ``[query_blocks, heads, key_blocks]``, causal.
    """
    chosen = top_k(scores, sizes.blocks, grid.visible(scores.device), recent=1)
    return BlockPattern.of(grid, chosen.transpose(0, 1))
