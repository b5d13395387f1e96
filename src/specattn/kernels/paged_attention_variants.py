"""What a GPU would compile of the paged attention kernels, so that it can be compiled where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn.kernels.paged_attention import PARTS_AT_ONCE, UNITS_AT_ONCE
from specattn.kernels.paged_attention_triton import attention_kernel, combine_kernel
from specattn.kernels.tiling import default_tiling

POINTERS = {
    "block_table": "*i32",
    "slots": "*i64",
    "positions": "*i64",
    "counts": "*i32",
    "indices": "*i32",
    "log_weights": "*fp32",
    "partials": "*fp32",
    "lses": "*fp32",
    "plan": "*i32",
}
"""Those that have the same type for every cache."""

ALIGNED = ("query_batch", "query_row", "query_head", "pool_row", "pool_head")
"""Strides that are multiples of 16 elements, as pointers are of 16 bytes; without them loads are narrow."""

Variant = tuple[Any, dict[str, str], dict[str, Any], int, int]
"""Kernel, signature, constants, warps, stages."""


EVERY_LIST: tuple[tuple[str, ...], ...] = ((), ("log_weights",), ("log_weights", "indices"))
"""Arguments that are ``None``: lists with log-weights, lists without, and all tokens."""


def variants(shared: int, dtype: str = "bf16") -> Iterator[Variant]:
    """The kernels as a device with ``shared`` bytes a multiprocessor gets them by default.

    Channels and query rows of a tile from the least to the most; every kind of list for the commonest of them.
    """
    for head_dim, block_m, kinds in (
        (64, 16, EVERY_LIST[:1]),
        (128, 32, EVERY_LIST),
        (256, 64, EVERY_LIST[:1]),
        (80, 128, EVERY_LIST[:1]),
    ):
        block_d = 1 << (head_dim - 1).bit_length()
        sizes: dict[str, Any] = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d}
        yield _combine(dtype, sizes)
        tiling = default_tiling(block_m, block_d, 2, shared)
        for absent in kinds:
            constants = sizes | {"PAGE": 16, "BLOCK_N": tiling.tokens, "UNITS": UNITS_AT_ONCE}
            constants |= dict.fromkeys(absent)
            signature = _signature(attention_kernel, dtype, constants)
            yield attention_kernel, signature, constants, tiling.warps, tiling.stages


def _combine(dtype: str, sizes: dict[str, Any]) -> Variant:
    constants = sizes | {"PARTS": PARTS_AT_ONCE}
    return combine_kernel, _signature(combine_kernel, dtype, constants), constants, 2, 3


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    data = dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")
    known = POINTERS | data | {"scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
    return {name: known.get(name, "i32") for name in kernel.arg_names}
