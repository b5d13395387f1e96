"""The target's attention as the draft predicts it: mixtures of the draft's heads, averaged over a round's rows.

What choosing tokens costs is bytes, and this is where most of them are. For 16 requests of 32K tokens, 4 rows, 64
exported heads and 56 targets (28 layers of 2 KV heads), in multiples of 16 x 32K elements:

- *float32 logits*: 256 x 4 bytes written by the draft, the same read here: 1.07 GB.
- *Probabilities summed up over the rows*: a row's probabilities need its sum over all tokens, so they can be added
  only after its pass, by a kernel a row that reads logits and sum and writes the sum: at 2 bytes a number
  64 x (2 + 2 + 2 + 2) a row, 1.07 GB as well, and three more launches.
- *float16 logits* (relative ones, see :mod:`specattn.kernels.score_export`): 256 x 2 bytes written, the same read
  here, once: .54 GB.

So each logit is written once and read once, in two bytes, and exponential, mean over the rows and product with the
weights are one kernel, between which nothing reaches memory. With 56 targets written and read again by the selection
in float32 (.23 GB) the sum is .77 GB: .18 ms at the copy speed of an H200, 2.6 % of a round of 7 ms. The exponentials
(134 million) and the product (4 GFLOP) need less time than that and run beside the loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import check_shape

TILE = 8192
"""Logits that a program holds at once: exported heads, rounded up to a power of two, times tokens."""

MOST_HEADS = 512
"""Exported heads that still leave room for 16 tokens a tile."""


def head_mixture(logits: Tensor, lse: Tensor, weights: Tensor, lengths: Tensor, *, out: Tensor) -> Tensor:
    """``out[b, t, n] = sum_h weights[t, h] * mean_r exp(logits[b, r, h, n] - lse[b, r, h])``.

    Row ``r`` of the ``rows`` sees ``lengths - rows + 1 + r`` tokens; what it does not see counts as 0, whatever the
    buffer holds there. With an average as ``weights`` the same kernel gives a group's mean attention, from which the
    draft's own nucleus is taken.

    Args:
        logits: ``[batch, rows, heads, length]``, last dimension contiguous, from
            :class:`specattn.kernels.score_export.ScoreExport`. Probabilities from float16 and bfloat16 are
            multiplied in TF32, whose relative error is below theirs; from float32 in full precision.
        lse: float32 ``[batch, rows, heads]``, contiguous.
        weights: float32 ``[targets, heads]``, contiguous.
        lengths: int32 ``[batch]``, tokens that the last row sees.
        out: ``[batch, targets, out_length]``, contiguous, float32, or bfloat16, which halves what the selection
            reads. Written as a whole: 0 from ``lengths`` on, where the round's further tokens may lie.

    Returns:
        ``out``.

    Raises:
        UsageError: shapes that do not fit together, or more heads than a tile holds.
    """
    from specattn.kernels.head_mixture_triton import head_mixture_kernel

    _check(logits, lse, weights, lengths, out)
    batch, rows, heads, length = logits.shape
    targets = weights.shape[0]
    block_heads = max(16, 1 << (heads - 1).bit_length())
    block_tokens = min(128, TILE // block_heads)
    grid = (-(-out.shape[-1] // block_tokens), batch)
    head_mixture_kernel[grid](
        logits,
        lse,
        weights,
        lengths,
        out,
        heads,
        targets,
        length,
        out.shape[-1],
        logits.stride(0),
        logits.stride(1),
        logits.stride(2),
        ROWS=rows,
        BLOCK_H=block_heads,
        BLOCK_T=max(16, min(64, TILE // block_heads, 1 << (targets - 1).bit_length())),
        BLOCK_L=block_tokens,
        PRECISION="ieee" if logits.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=1,
    )
    return out


def head_mixture_reference(
    logits: Tensor, lse: Tensor, weights: Tensor, lengths: Tensor, *, out: Tensor
) -> Tensor:
    """The same in float32 PyTorch."""
    _check(logits, lse, weights, lengths, out)
    _, rows, _, length = logits.shape
    kept = min(length, out.shape[-1])
    seen = lengths[:, None] - rows + 1 + torch.arange(rows, device=lengths.device)
    visible = torch.arange(kept, device=lengths.device) < seen[:, :, None, None]
    probabilities = (logits[..., :kept].float() - lse[..., None]).exp().masked_fill(~visible, 0)
    out.zero_()
    out[..., :kept] = torch.einsum("th,bhn->btn", weights.float(), probabilities.mean(1)).to(out.dtype)
    return out


def _check(logits: Tensor, lse: Tensor, weights: Tensor, lengths: Tensor, out: Tensor) -> None:
    check_shape("logits", logits, None, None, None, None)
    batch, rows, heads, _ = logits.shape
    check_shape("lse", lse, batch, rows, heads)
    check_shape("weights", weights, None, heads)
    check_shape("lengths", lengths, batch)
    check_shape("out", out, batch, weights.shape[0], None)
    if logits.stride(-1) != 1 or not (
        lse.is_contiguous() and weights.is_contiguous() and out.is_contiguous()
    ):
        raise UsageError("lse, weights, out and the last dimension of logits must be contiguous")
    if heads > MOST_HEADS:
        raise UsageError(
            f"{heads} heads are exported: a mixture takes {MOST_HEADS}; choose a global set of heads"
        )
