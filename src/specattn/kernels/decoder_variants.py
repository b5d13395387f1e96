"""What a GPU would compile of a decoder layer's kernels, attention aside, so that none is needed to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn.kernels.add_norm_triton import add_norm_kernel
from specattn.kernels.compilation import Variant
from specattn.kernels.gated_triton import gated_kernel
from specattn.kernels.linear_add_triton import linear_add_kernel
from specattn.kernels.norm_linear_triton import norm_linear_kernel
from specattn.kernels.norm_rope_linear_triton import norm_rope_linear_kernel
from specattn.kernels.product_tiling import DEPTH, STAGES
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
        yield from _products(block, columns)


def _products(block: int, columns: int) -> Iterator[Variant]:
    """Of rows in tiles of ``block``: gated or not, and shared by programs or not."""
    types = {"eps": "fp32", "squares": "*fp32", "partials": "*fp32", "arrivals": "*i32"}
    types |= dict.fromkeys(("rows", "channels", "outputs", "parts", "steps"), "i32")
    shape = {"EVEN_N": True, "EVEN_K": True, "BLOCK_M": block, "BLOCK_N": columns, "SHRINK": 1.0}
    shape |= {"BLOCK_K": DEPTH, "EARLY": False}
    for is_gated in (False, True):
        constants = shape | {"GATED": is_gated, "SQUARES": 64} | ({"bias": None} if is_gated else {})
        yield _variant(norm_linear_kernel, constants, types, 4, stages=STAGES)
    heads = {"QUERY_HEADS": 14, "KV_HEADS": 2, "HALF": 32, "SQUARES": 64}
    constants = {name: value for name, value in shape.items() if name != "EVEN_N"} | heads
    rope = types | {"cosine": "*fp32", "sine": "*fp32", "positions": "*i64", "rows": "*i64", "tokens": "i32"}
    yield _variant(norm_rope_linear_kernel, constants, rope, 4, stages=STAGES)
    for parts in (1, 4):
        names = ["bias", "partials", "arrivals"] if parts == 1 else ["bias"]
        constants = shape | {"PARTS": parts} | dict.fromkeys(names)
        yield _variant(linear_add_kernel, constants, types, 4, stages=STAGES)


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
