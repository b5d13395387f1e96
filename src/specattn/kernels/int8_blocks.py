"""Queries and keys as eight-bit integers with one scale a block (SageAttention; arXiv 2410.02367)."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.kernels.blocks import in_blocks

LARGEST = 127


def quantise_blocks(tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round each block of tokens to integers of its own scale.

    Args:
        tokens: ``[..., n, head_dim]``.
        block: tokens a block.

    Returns:
        int8 of the shape of ``tokens``, and float32 scales ``[..., blocks]``: ``tokens`` is about their product, to
        half a scale in each element.
    """
    blocks = in_blocks(tokens.float(), block)
    scales = blocks.abs().amax((-1, -2)).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    integers = (blocks / scales[..., None, None]).round().to(torch.int8)
    return integers.flatten(-3, -2)[..., : tokens.shape[-2], :], scales


def smooth_keys(keys: Tensor) -> Tensor:
    """Keys ``[..., n, head_dim]`` without their mean over the tokens, float32.

    The mean moves all logits of a row by the same amount, which softmax does not see; channels in which all keys are
    alike then waste no bits.
    """
    keys = keys.float()
    return keys - keys.mean(-2, keepdim=True)
