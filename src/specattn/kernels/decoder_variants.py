"""What a GPU would compile of a decoder layer's kernels, attention aside, so that none is needed to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from specattn.kernels.add_norm_triton import add_norm_kernel
from specattn.kernels.compilation import Variant
from specattn.kernels.default_tilings import (
    DEPTH,
    HALF_GATED,
    HALF_NORM,
    STAGES,
    WIDE_GATED,
    WIDE_LONG,
    WIDE_NORM,
    WIDE_SHORT,
    WIDE_SPLIT,
)
from specattn.kernels.gated_triton import gated_kernel
from specattn.kernels.linear_add_triton import linear_add_kernel
from specattn.kernels.norm_linear_triton import norm_linear_kernel
from specattn.kernels.norm_rope_linear_triton import norm_rope_linear_kernel
from specattn.kernels.product_tiling import ProductTiling
from specattn.kernels.rope_append_triton import rope_append_kernel


def variants() -> Iterator[Variant]:
    """The shapes of Llama-3.1-8B and Qwen3-8B in bfloat16, and the products of Qwen2.5-0.5B and 1.5B."""
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
        yield _norm_product(block, narrow)
        yield _gated_product(block, narrow)
        yield _rope_product(block, narrow)
        for parts in (1, 4):
            yield _split_product(block, narrow, parts)
    for block in (16, 64):
        for early in (False, True):
            for tiling in (WIDE_NORM, HALF_NORM):
                yield _norm_product(block, _on(tiling, early))
                yield _rope_product(block, _on(tiling, early))
            for tiling in (WIDE_GATED, HALF_GATED):
                yield _gated_product(block, _on(tiling, early))
            for tiling, parts in ((WIDE_SHORT, 1), (WIDE_SPLIT, 3), (WIDE_LONG, 5)):
                yield _split_product(block, _on(tiling, early), parts)


def _on(tiling: ProductTiling, early: bool) -> ProductTiling:
    """``tiling`` as a GPU takes it whose launches can start early, or which cannot."""
    return replace(tiling, early=early, described=early and tiling.described)


def _norm_product(block: int, tiling: ProductTiling) -> Variant:
    constants: dict[str, Any] = {"GATED": False, "SQUARES": 64, "EVEN_N": True}
    return _product(norm_linear_kernel, constants, block, tiling, [tiling.columns])


def _gated_product(block: int, tiling: ProductTiling) -> Variant:
    constants = {"GATED": True, "SQUARES": 64, "EVEN_N": True, "bias": None}
    return _product(norm_linear_kernel, constants, block, tiling, [2, tiling.columns])


def _rope_product(block: int, tiling: ProductTiling) -> Variant:
    constants = {"QUERY_HEADS": 14, "KV_HEADS": 2, "HALF": 32, "SQUARES": 64}
    return _product(norm_rope_linear_kernel, constants, block, tiling, [2, tiling.columns // 2])


def _split_product(block: int, tiling: ProductTiling, parts: int) -> Variant:
    constants: dict[str, Any] = {"PARTS": parts, "EVEN_N": True}
    constants |= dict.fromkeys(["bias"] if parts > 1 else ["bias", "partials", "arrivals"])
    return _product(linear_add_kernel, constants, block, tiling, [tiling.columns])


def _product(
    kernel: Any, constants: dict[str, Any], block: int, tiling: ProductTiling, lines: list[int]
) -> Variant:
    """Of rows in tiles of ``block``, and weights in tiles of ``lines``."""
    constants |= {"EVEN_K": True, "BLOCK_M": block, "BLOCK_N": tiling.columns, "BLOCK_K": tiling.depth}
    constants |= {"SHRINK": 1.0, "DESCRIBED": tiling.described, "EARLY": tiling.early}
    types = {"eps": "fp32", "squares": "*fp32", "partials": "*fp32", "arrivals": "*i32"}
    types |= {"cosine": "*fp32", "sine": "*fp32", "positions": "*i64"}
    types |= dict.fromkeys(("rows", "channels", "outputs", "parts", "steps", "tokens"), "i32")
    if kernel is norm_rope_linear_kernel:
        types["rows"] = "*i64"
    if tiling.described:
        for name, tile in (("x", [block]), ("weight", lines)):
            types[name] = f"tensordesc<bf16[{','.join(map(str, [*tile, tiling.depth]))}]>"
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
