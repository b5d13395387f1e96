"""What a GPU would compile of a decoder layer's kernels, attention aside, so that none is needed to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from specattn.kernels.add_norm_triton import add_norm_kernel
from specattn.kernels.compilation import Variant
from specattn.kernels.default_tilings import DEPTH, STAGES, WIDE_GATED, WIDE_LONG, WIDE_NORM, WIDE_SPLIT
from specattn.kernels.gated_triton import gated_kernel
from specattn.kernels.linear_add_triton import linear_add_kernel
from specattn.kernels.norm_linear_triton import norm_linear_kernel
from specattn.kernels.product_tiling import ProductTiling
from specattn.kernels.rope_append_triton import rope_append_kernel


def variants() -> Iterator[Variant]:
    """The shapes of Llama-3.1-8B and Qwen3-8B in bfloat16."""
    yield _variant(
        add_norm_kernel, {"HAS_RESIDUAL": True, "BLOCK": 4096}, {"eps": "fp32", "hidden": "i32"}, 8
    )
    yield _variant(gated_kernel, {"BLOCK": 1024}, {"width": "i32"}, 4)
    types = {"eps": "fp32", "cosine": "*fp32", "sine": "*fp32", "positions": "*i64", "rows": "*i64"}
    types |= {"codes": "*i8", "ranges": "*fp16", "pool_rows": "i32"}
    for normed, bits in ((False, 0), (True, 0), (False, 4), (False, 8)):
        heads: dict[str, Any] = {"QUERY_HEADS": 32, "KV_HEADS": 8, "HALF": 64, "NORMED": normed, "BITS": bits}
        heads |= {} if bits else {"codes": None, "ranges": None}
        yield _variant(rope_append_kernel, heads, types, 1)
    for block, columns in ((16, 16), (16, 32), (32, 32)):
        narrow = ProductTiling(columns, DEPTH, stages=STAGES)
        for is_gated in (False, True):
            yield _norm_product(block, narrow, is_gated)
        for parts in (1, 4):
            yield _split_product(block, replace(narrow, parts=parts))
    for block in (64, 128):
        for early in (False, True):
            yield _norm_product(block, _wide(WIDE_NORM, early, parts=4), False)
            yield _norm_product(block, _wide(WIDE_GATED, early), True)
            for tiling in (WIDE_SPLIT, WIDE_LONG):
                yield _split_product(block, _wide(tiling, early, parts=5))


def _wide(tiling: ProductTiling, early: bool, parts: int = 1) -> ProductTiling:
    """``tiling`` as a GPU takes it whose launches can start early, or which cannot."""
    ahead, described = (tiling.ahead, tiling.described) if early else (0, False)
    return replace(tiling, parts=parts, early=early, ahead=ahead, described=described, stages=3)


def _norm_product(block: int, tiling: ProductTiling, is_gated: bool) -> Variant:
    """Of rows in tiles of ``block``, after a norm."""
    constants = (
        _shape(block, tiling) | {"GATED": is_gated, "SQUARES": 64} | ({"bias": None} if is_gated else {})
    )
    weight = [2, tiling.columns, tiling.depth] if is_gated else [tiling.columns, tiling.depth]
    return _product(norm_linear_kernel, constants, block, tiling, weight)


def _split_product(block: int, tiling: ProductTiling) -> Variant:
    """Of rows in tiles of ``block``, into the stream."""
    constants = _shape(block, tiling) | {"bias": None}
    return _product(linear_add_kernel, constants, block, tiling, [tiling.columns, tiling.depth])


def _shape(block: int, tiling: ProductTiling) -> dict[str, Any]:
    names = [] if tiling.ahead else ["lines"]
    names += [] if tiling.parts > 1 else ["partials", "arrivals"]
    shape = {"EVEN_N": True, "EVEN_K": True, "BLOCK_M": block, "BLOCK_N": tiling.columns, "SHRINK": 1.0}
    shape |= {"BLOCK_K": tiling.depth, "PARTS": tiling.parts, "SWAPPED": tiling.swapped}
    shape |= {"DESCRIBED": tiling.described, "EARLY": tiling.early, "AHEAD": tiling.ahead}
    return shape | dict.fromkeys(names)


def _product(
    kernel: Any, constants: dict[str, Any], block: int, tiling: ProductTiling, weight: list[int]
) -> Variant:
    types = {"eps": "fp32", "squares": "*fp32", "partials": "*fp32", "arrivals": "*i32"}
    types |= dict.fromkeys(("rows", "channels", "outputs", "written", "steps"), "i32")
    if tiling.described:
        tiles = {"x": [block, tiling.depth], "weight": weight}
        types |= {name: f"tensordesc<bf16{lines}>".replace(" ", "") for name, lines in tiles.items()}
    variant = _variant(kernel, constants, types, tiling.warps, tiling.stages)
    return variant._replace(least=90 if tiling.early else 80)


def _variant(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int = 3
) -> Variant:
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names
    }
    aligned = tuple(
        name for name, kind in signature.items() if kind.startswith("*") or name in ("channels", "outputs")
    )
    return Variant(kernel, signature, constants, warps=warps, stages=stages, aligned=aligned)
