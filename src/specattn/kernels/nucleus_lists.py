"""Top-p and top-k from scores to ascending lists, in one launch: ``nucleus.py`` and ``Selection.from_mask`` on a GPU.

The lists are those of the references, computed in float32. Top-k is exact. Top-p gives the reference's nucleus, ties
and forced positions included, for some ``q`` with ``p (1 - 1e-5) <= q <= p + 1e-5`` instead of ``p``: sums of 131,072
float32 weights are no more exact than that. A row whose sum overflows float32 is one of infinite mass.
"""

from __future__ import annotations

import itertools

import torch
import triton
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import multiprocessors
from specattn.kernels.nucleus_triton import select_kernel
from specattn.kernels.threshold_triton import Blocks
from specattn.selection.base import Selection

STEPS = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}
"""Types of scores, with the distance between the keys of neighbouring ones, as float32."""

LARGEST_RESIDENT = 32768
BLOCKS = [
    Blocks(resident=1024, tile=1024, warps=4, registers=128),
    Blocks(resident=4096, tile=2048, warps=4, registers=128),
    Blocks(resident=16384, tile=4096, warps=8, registers=128),
    Blocks(resident=LARGEST_RESIDENT, tile=8192, warps=16, registers=128),
]
"""For rows up to a width: the first that holds all of a row."""
LONG_BLOCKS = Blocks(resident=LARGEST_RESIDENT, tile=8192, warps=16, registers=128)
"""For longer rows."""
STREAMED_BLOCKS = Blocks(resident=8192, tile=8192, warps=8, registers=128, vector=8)
LONGEST_STREAMED = 3 * 16384
"""For 16-bit rows of more elements than ``resident``, up to ``LONGEST_STREAMED``.

Two programs run on a multiprocessor, whose L1 cache has room for their rows.
"""


def nucleus_lists(
    scores: Tensor,
    p: float | Tensor,
    lengths: Tensor,
    *,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
    blocks: Blocks | None = None,
    entries: Tensor | None = None,
    also: Tensor | None = None,
    fill: bool = True,
) -> Selection:
    """The lists of :func:`specattn.kernels.nucleus.nucleus`, as far as they fit into ``capacity``.

    Where the nucleus has more than ``capacity`` positions, the list has the forced ones and the heaviest others that
    fit, of equal ones the most recent. Nothing is asked of the device, so a call can be captured in a CUDA graph.

    Args:
        scores: ``[batch, ..., length]`` on a GPU, float32, bfloat16 or float16. The last dimension is contiguous, the
            others but the first are evenly spaced.
        p: fraction of the mass, above 0, or a tensor of fractions broadcastable to ``scores.shape[:-1]``; read as
            float32.
        lengths: int ``[batch]``, how many positions are visible.
        capacity: entries of a list, at least ``sink + recent`` or ``length``.
        sink, recent: the first, and the last visible, positions of each row, which are always in its list.
        out: where the lists go: ``indices`` int32 ``[batch, ..., capacity]`` and ``counts`` int32 ``[batch, ...]``,
            contiguous. Every entry is written, but for ``fill``.
        blocks: how a program holds its row; by default what suits the length.
        entries: int ``[batch]``, contiguous: places in the first dimension of ``scores``, which may then be longer or
            shorter than the batch; one after the other if ``None``.
        also: int32 ``[batch, n]``, contiguous: positions that are in all lists of a batch entry beside the nucleus, as
            far as they are visible; negative: none. A list that has no room for them has its nucleus alone.
        fill: whether what follows a list is -1; otherwise it stays as it is, for readers that go by counts.

    Raises:
        UsageError: an argument is not as described.
    """
    if not isinstance(p, Tensor) and not p > 0:
        raise UsageError(f"p = {p} is not a fraction of the mass: give a number in (0, 1]")
    limit = p.float() if isinstance(p, Tensor) else float(p)
    return _launch(
        scores, limit, lengths, capacity, sink, recent, out, blocks, entries, also, by_mass=True, fill=fill
    )


def top_k_lists(
    scores: Tensor,
    k: int | Tensor,
    lengths: Tensor,
    *,
    capacity: int,
    sink: int = 0,
    recent: int = 0,
    out: Selection | None = None,
    blocks: Blocks | None = None,
) -> Selection:
    """The lists of :func:`specattn.kernels.nucleus.top_k`, as far as they fit into ``capacity``.

    ``k`` may be a tensor broadcastable to ``scores.shape[:-1]``; the other arguments are those of ``nucleus_lists``.

    Raises:
        UsageError: an argument is not as described.
    """
    if not isinstance(k, Tensor) and k < 0:
        raise UsageError(f"k = {k} is negative: give the number of positions to keep, 0 or more")
    limit = k.int() if isinstance(k, Tensor) else k
    return _launch(scores, limit, lengths, capacity, sink, recent, out, blocks, None, None, by_mass=False)


def choose_blocks(length: int, dtype: torch.dtype = torch.float32) -> Blocks:
    """How rows of up to ``length`` elements are held."""
    if STEPS[dtype] > 1 and STREAMED_BLOCKS.resident < length <= LONGEST_STREAMED:
        return STREAMED_BLOCKS
    return next((blocks for blocks in BLOCKS if length <= blocks.resident), LONG_BLOCKS)


def widened(scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of more than one token: Triton 3.6 takes a width of 1 for a constant and fails to compile with it."""
    if scores.shape[-1] > 1:
        return scores, lengths
    return torch.nn.functional.pad(scores, (0, 1)), lengths.clamp(max=1)


def empty_lists(scores: Tensor, capacity: int) -> Selection:
    """Lists for the rows of ``scores``, not yet written."""
    rows = scores.shape[:-1]
    indices = torch.empty(*rows, capacity, dtype=torch.int32, device=scores.device)
    return Selection(indices, torch.empty(rows, dtype=torch.int32, device=scores.device))


def _launch(
    scores: Tensor,
    limit: float | Tensor,
    lengths: Tensor,
    capacity: int,
    sink: int,
    recent: int,
    out: Selection | None,
    blocks: Blocks | None,
    entries: Tensor | None,
    also: Tensor | None,
    *,
    by_mass: bool,
    fill: bool = True,
) -> Selection:
    # What the lists are made from, without a copy: of as many entries as there are lists, whichever they are.
    listed = scores if entries is None else scores[:1].expand(len(entries), *scores.shape[1:])
    check_scores(listed, lengths, capacity, sink, recent, out)
    _check_also(also, len(listed))
    out = empty_lists(listed, capacity) if out is None else out
    scores, lengths = widened(scores, lengths)
    blocks = choose_blocks(scores.shape[-1], scores.dtype) if blocks is None else blocks
    rows = listed.shape[:-1]
    if isinstance(limit, Tensor):
        limit = limit.broadcast_to(rows).contiguous()
    if rows.numel():
        flat = scores.view(len(scores), -1, scores.shape[-1])
        select_kernel[(rows.numel(),)](
            flat,
            lengths,
            limit,
            out.indices,
            out.counts,
            entries,
            also,
            *flat.stride()[:2],
            flat.shape[1],
            flat.shape[2],
            capacity,
            sink,
            recent,
            BY_MASS=by_mass,
            FILL=fill,
            PER_ROW=isinstance(limit, Tensor),
            STEP=STEPS[scores.dtype],
            FORCED=triton.next_power_of_2(max(sink + recent, 1)),
            ALSO=0 if also is None else also.shape[1],
            AHEAD=_programs_at_a_time(scores.device, blocks, rows.numel()),
            B=blocks,
            num_warps=blocks.warps,
            maxnreg=blocks.registers,
        )
    return out


def _programs_at_a_time(device: torch.device, blocks: Blocks, rows: int) -> int:
    """How many programs run at a time, if each fills a multiprocessor and others follow; otherwise 0."""
    if device.type != "cuda" or blocks.resident < LARGEST_RESIDENT:
        return 0
    at_a_time = multiprocessors(device)
    return at_a_time if rows > at_a_time else 0


def _check_also(also: Tensor | None, batch: int) -> None:
    if also is not None and (
        also.dim() != 2 or len(also) != batch or also.dtype != torch.int32 or not also.is_contiguous()
    ):
        raise UsageError(
            f"also is {also.dtype} {list(also.shape)}: give int32 positions [{batch}, n], contiguous"
        )


def check_scores(
    scores: Tensor, lengths: Tensor, capacity: int, sink: int, recent: int, out: Selection | None
) -> None:
    if scores.dim() < 2 or scores.dtype not in STEPS:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in STEPS)
        raise UsageError(
            f"scores are {scores.dtype} {list(scores.shape)}: give [batch, ..., length] in {kinds}"
        )
    if scores.stride(-1) != 1 or not _evenly_spaced(scores):
        raise UsageError(f"scores have strides {list(scores.stride())}: give contiguous() ones")
    if lengths.shape != scores.shape[:1]:
        got, shape = list(lengths.shape), list(scores.shape)
        raise UsageError(f"lengths has shape {got}: scores {shape} need {shape[:1]}, one a batch entry")
    if sink < 0 or recent < 0:
        raise UsageError(f"sink = {sink}, recent = {recent}: give numbers of positions, 0 or more")
    needed = min(sink + recent, scores.shape[-1])
    if capacity < needed:
        raise UsageError(
            f"capacity = {capacity} has no room for sink = {sink} and recent = {recent}: give {needed} or more"
        )
    if out is not None and (
        out.indices.shape != (*scores.shape[:-1], capacity)
        or out.counts.shape != scores.shape[:-1]
        or not (out.indices.is_contiguous() and out.counts.is_contiguous())
    ):
        got, counts = list(out.indices.shape), list(out.counts.shape)
        raise UsageError(
            f"out has indices {got} and counts {counts}: scores {list(scores.shape)} and "
            f"capacity = {capacity} need {[*scores.shape[:-1], capacity]} and {list(scores.shape[:-1])}, contiguous"
        )


def _evenly_spaced(scores: Tensor) -> bool:
    """Whether one stride leads through all dimensions between the first and the last."""
    inner = [(size, stride) for size, stride in zip(scores.shape, scores.stride(), strict=True) if size > 1]
    inner = inner[1 if scores.shape[0] > 1 else 0 : -1 if scores.shape[-1] > 1 else None]
    return all(outer[1] == size * stride for outer, (size, stride) in itertools.pairwise(inner))
