"""What a GPU would compile of the kernels of top-p and top-k, of lists that are drawn and of echoes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn.kernels.compilation import Variant
from specattn.kernels.echoes import LONGEST, NOWHERE
from specattn.kernels.echoes_triton import BLOCK, LONGEST_TEXT, echoes_kernel
from specattn.kernels.nucleus_lists import BLOCKS, LONG_BLOCKS, STREAMED_BLOCKS
from specattn.kernels.nucleus_triton import select_kernel
from specattn.kernels.rate_lists import TILE as RATE_TILE
from specattn.kernels.rate_lists import WARPS as RATE_WARPS
from specattn.kernels.rate_triton import rate_kernel
from specattn.kernels.tail_lists import TILE
from specattn.kernels.tail_triton import tail_kernel
from specattn.kernels.threshold_triton import Blocks

SPILLS = 128
"""Bytes a thread, in the code for ties and for lists beyond their capacity; a thread has up to 128 elements."""

ALIGNED = ("scores", "lengths", "indices", "counts", "batch_stride", "row_stride", "width", "capacity")


def variants() -> Iterator[Variant]:
    """Top-p of float32 scores in rows of every length, with a tail and without; the others in short ones, or in any."""
    for blocks in (*BLOCKS, LONG_BLOCKS):
        yield _variant("fp32", 1, blocks, by_mass=True)
    for blocks in (BLOCKS[0], STREAMED_BLOCKS):
        yield _variant("bf16", 1 << 16, blocks, by_mass=True, also=12)
    yield _variant("fp32", 1, BLOCKS[0], by_mass=False)
    for blocks in (*BLOCKS, LONG_BLOCKS):
        yield _tail_variant(blocks)
    for dtype in ("fp32", "bf16"):
        yield _rate_variant(dtype)
    yield _echoes_variant()


def _variant(dtype: str, step: int, blocks: Blocks, *, by_mass: bool, also: int = 0) -> Variant:
    constants: dict[str, Any] = {
        "entries": None,
        "ALSO": also,
        "BY_MASS": by_mass,
        "FILL": True,
        "PER_ROW": False,
        "STEP": step,
        "FORCED": 128,
        "AHEAD": 132 if blocks.resident == LONG_BLOCKS.resident else 0,
        "B": blocks,
    }
    if not also:
        constants["also"] = None
    signature = {name: "constexpr" if name in constants else "i32" for name in select_kernel.arg_names}
    if also:
        signature["also"] = "*i32"
    signature |= {"scores": f"*{dtype}", "limit": "fp32" if by_mass else "i32"}
    signature |= dict.fromkeys(("lengths", "indices", "counts"), "*i32")
    return Variant(
        select_kernel,
        signature,
        constants,
        warps=blocks.warps,
        aligned=ALIGNED,
        registers=blocks.registers,
        stack=SPILLS,
    )


def _tail_variant(blocks: Blocks) -> Variant:
    constants: dict[str, Any] = {"STEP": 1, "FORCED": 128, "TILE": TILE, "B": blocks}
    signature = {name: "constexpr" if name in constants else "i32" for name in tail_kernel.arg_names}
    signature |= {"scores": "*fp32", "log_weights": "*fp32", "shifts": "*i64"}
    signature |= dict.fromkeys(("p", "a", "power"), "fp32")
    signature |= dict.fromkeys(("lengths", "draws", "indices", "counts"), "*i32")
    return Variant(
        tail_kernel,
        signature,
        constants,
        warps=blocks.warps,
        aligned=(*ALIGNED, "draws", "shifts", "log_weights"),
        registers=blocks.registers,
        stack=SPILLS,
    )


def _rate_variant(dtype: str) -> Variant:
    constants = {"TILE": RATE_TILE}
    signature = {name: "constexpr" if name in constants else "i32" for name in rate_kernel.arg_names}
    signature |= {"scores": f"*{dtype}", "log_weights": "*fp32", "shifts": "*i64"}
    signature |= dict.fromkeys(("rate", "a", "power"), "fp32")
    signature |= dict.fromkeys(("lengths", "indices", "counts"), "*i32")
    return Variant(
        rate_kernel, signature, constants, warps=RATE_WARPS, aligned=(*ALIGNED, "shifts", "log_weights")
    )


def _echoes_variant() -> Variant:
    constants = {
        "MATCHES": 4,
        "PLACES": 4,
        "LONGEST": LONGEST,
        "NOWHERE": NOWHERE,
        "SPAN": LONGEST_TEXT,
        "BLOCK": BLOCK,
    }
    signature = dict.fromkeys(echoes_kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {"text": "*i32", "slots": "*i64", "starts": "*i64", "found": "*i32"}
    return Variant(echoes_kernel, signature, constants, warps=8, aligned=("text", "slots", "starts", "found"))
