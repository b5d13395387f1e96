"""From scores to the lists of nucleus and sampled tail, with their log-weights, in one launch on a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus_lists import STEPS, check_scores, choose_blocks, empty_lists, widened
from specattn.kernels.tail_triton import tail_kernel
from specattn.kernels.threshold_triton import Blocks
from specattn.selection.base import Selection

TILE = 2048


def tail_lists(
    scores: Tensor,
    p: float,
    lengths: Tensor,
    draws: Tensor,
    shifts: Tensor,
    a: float,
    *,
    power: float = 1.0,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
    blocks: Blocks | None = None,
    tile: int = TILE,
) -> Selection:
    """The nucleus as :func:`specattn.kernels.nucleus_lists.nucleus_lists` lists it, and a sample of what it leaves out.

    The sample is that of :func:`specattn.selection.weighted_tail.systematic`, its probabilities those of ``inclusion``,
    computed in float32. Each token's log-weight belongs to the very probability with which it was drawn.

    Args:
        scores, p, lengths, sink, recent, blocks: as in ``nucleus_lists``; ``p`` is a number.
        draws: int32 ``[batch]``, tokens to draw for each list, at least 1.
        shifts: int64 ``scores.shape[:-1]``, contiguous, uniform in [0, 2**40).
        a: the uniform share of the proposal, in (0, 1].
        power: a drawn token's weight is its probability to the power of ``-power``, in (0, 1].
        capacity: entries of a list, at least ``length``.
        out: where the lists go, with ``log_weights`` float32 ``[batch, ..., capacity]``. Every entry is written.
        tile: tokens that are read at a time once the nucleus is known.

    Raises:
        UsageError: an argument is not as described.
    """
    if not p > 0:
        raise UsageError(f"p = {p} is not a fraction of the mass: give a number in (0, 1]")
    if draws.shape != scores.shape[:1]:
        raise UsageError(
            f"draws {list(draws.shape)} do not match scores {list(scores.shape)}: give one a request"
        )
    out, weights = room_for_draws(scores, lengths, shifts, a, power, capacity, sink, recent, out)
    rows = shifts.shape
    scores, lengths = widened(scores, lengths)
    blocks = choose_blocks(scores.shape[-1], scores.dtype) if blocks is None else blocks
    if rows.numel():
        flat = scores.view(rows[0], -1, scores.shape[-1])
        tail_kernel[(rows.numel(),)](
            flat,
            lengths,
            draws,
            shifts,
            out.indices,
            weights,
            out.counts,
            *flat.stride()[:2],
            flat.shape[1],
            flat.shape[2],
            capacity,
            sink,
            recent,
            float(p),
            float(a),
            float(power),
            STEP=STEPS[scores.dtype],
            FORCED=triton.next_power_of_2(max(sink + recent, 1)),
            TILE=tile,
            B=blocks,
            num_warps=blocks.warps,
            maxnreg=blocks.registers,
        )
    return out


def room_for_draws(
    scores: Tensor,
    lengths: Tensor,
    shifts: Tensor,
    a: float,
    power: float,
    capacity: int,
    sink: int,
    recent: int,
    out: Selection | None,
) -> tuple[Selection, Tensor]:
    """``out``, or new lists, and their log-weights, once all arguments of a launch that draws have been checked."""
    for name, share in (("a", a), ("power", power)):
        if not 0 < share <= 1:
            raise UsageError(f"{name} = {share} lies outside of (0, 1]: give for example {name} = 1")
    check_scores(scores, lengths, capacity, sink, recent, out)
    if capacity < scores.shape[-1]:
        raise UsageError(
            f"capacity = {capacity} is less than a row may list: give {scores.shape[-1]} or more"
        )
    if shifts.shape != scores.shape[:-1] or not shifts.is_contiguous():
        raise UsageError(
            f"shifts {list(shifts.shape)} do not match scores {list(scores.shape)}: give one a row, contiguous"
        )
    if out is None:
        lists = empty_lists(scores, capacity)
        out = Selection(lists.indices, lists.counts, torch.empty_like(lists.indices, dtype=torch.float32))
    weights = out.log_weights
    if weights is None or weights.shape != out.indices.shape or not weights.is_contiguous():
        raise UsageError("out has no contiguous log_weights of the shape of its indices")
    return out, weights
