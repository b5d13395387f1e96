"""What a GPU would compile of the kernels between a decoder layer's products, so that none is needed to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn.kernels.add_norm_triton import add_norm_kernel
from specattn.kernels.compilation import Variant
from specattn.kernels.gated_triton import gated_kernel
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


def _variant(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> Variant:
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16") for name in kernel.arg_names
    }
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Variant(kernel, signature, constants, warps=warps, aligned=aligned)
