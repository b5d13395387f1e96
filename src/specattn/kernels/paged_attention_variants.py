"""What a GPU would compile of the paged attention kernels, so that it can be compiled where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specattn.kernels.compilation import Variant
from specattn.kernels.paged_attention_triton import attention_kernel
from specattn.kernels.schedule_triton import schedule_kernel
from specattn.kernels.tiling import Partition, default_tiling, list_tiling

H100_SHARED = 228 * 1024
PROCESSORS = 132
FEW_UNITS, MANY_UNITS = 8, 128
"""Lists for which each program is large, and for which it is not."""

POINTERS = {
    "block_table": "*i32",
    "slots": "*i64",
    "positions": "*i64",
    "counts": "*i32",
    "indices": "*i32",
    "log_weights": "*fp32",
    "partials": "*fp32",
    "lses": "*fp32",
    "stretches": "*i32",
    "arrivals": "*i32",
    "lse_out": "*fp32",
}
"""Those that have the same type for every cache."""

STRIDES = ("query_batch", "query_row", "query_head", "pool_row", "pool_head")
"""Multiples of 16 elements; if they were not, loads would be narrow."""

ALL_TOKENS = ("lse_out", "log_weights", "indices")
"""Arguments that are ``None`` when all tokens are read; without log-weights only the first two are."""


def variants() -> Iterator[Variant]:
    """Attention as an H100 gets it, and what shares it among programs."""
    yield from attention_variants()
    yield from early_variants()
    signature = dict.fromkeys(schedule_kernel.arg_names, "i32") | dict.fromkeys(
        ("counts", "stretches"), "*i32"
    )
    constants = {"BLOCK_N": 64, "UNITS": MANY_UNITS}
    signature |= dict.fromkeys(constants, "constexpr")
    yield Variant(schedule_kernel, signature, constants, warps=4, aligned=("counts", "stretches"))


def attention_variants(shared: int = H100_SHARED, dtype: str = "bf16") -> Iterator[Variant]:
    """The kernel as a device with ``shared`` bytes a multiprocessor gets them by default.

    Channels and query rows of a tile from the least to the most; each kind of list for the commonest of them.
    """
    yield from _sized(64, 16, shared, dtype, stack=32)
    yield from _sized(128, 32, shared, dtype, stack=32)
    yield from _sized(128, 32, shared, dtype, absent=ALL_TOKENS[:2], stack=32)
    yield from _sized(64, 16, shared, dtype, absent=ALL_TOKENS[1:2], stack=32)
    yield from _sized(128, 32, shared, dtype, absent=ALL_TOKENS)
    yield from _sized(128, 32, shared, dtype, absent=ALL_TOKENS[:2], units=FEW_UNITS, stack=32)
    yield from _sized(256, 64, shared, dtype, stack=96)
    yield from _sized(80, 128, shared, dtype, stack=256)


def early_variants() -> Iterator[Variant]:
    """The kernel as a GPU takes it whose launches can start early, in a decoder's layers and elsewhere."""
    for absent in ((), ALL_TOKENS[1:2], ALL_TOKENS):
        for variant in _sized(128, 32, H100_SHARED, "bf16", absent, stack=32):
            yield early(variant)
            yield early(variant, settled=True)
    for sizes in ((64, 16), (128, 32)):
        for variant in _sized(*sizes, H100_SHARED, "bf16", ALL_TOKENS[1:2], units=32, stack=32):
            yield early(variant, settled=True)


def early(variant: Variant, settled: bool = False) -> Variant:
    """``variant`` as a GPU takes it whose launches can start early; ``settled`` in a decoder's layers."""
    return variant._replace(constants={**variant.constants, "EARLY": True, "SETTLED": settled}, least=90)


def _sized(
    head_dim: int,
    block_m: int,
    shared: int,
    dtype: str,
    absent: tuple[str, ...] = (),
    units: int = MANY_UNITS,
    stack: int = 0,
) -> Iterator[Variant]:
    """Attention with tiles of one size."""
    block_d = 1 << (head_dim - 1).bit_length()
    tiling = default_tiling(block_m, block_d, 2, shared)
    if "indices" not in absent:
        tiling = list_tiling(tiling, units, block_d, 2, PROCESSORS, shared)
    sizes: dict[str, Any] = {"GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d}
    at_once = {
        "PARTS": Partition(tiling, 1, 1, 1, block_m, block_d).parts_at_once,
        "EARLY": False,
        "SETTLED": False,
    }
    constants = sizes | at_once | {"BLOCKS": 1, "PAGE": 16, "BLOCK_N": tiling.tokens} | dict.fromkeys(absent)
    yield _variant(attention_kernel, dtype, constants, tiling.warps, tiling.stages, stack)


def _variant(
    kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int, stack: int
) -> Variant:
    data = dict.fromkeys(("query", "keys", "values", "out"), f"*{dtype}")
    known = POINTERS | data | {"scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in STRIDES)
    return Variant(kernel, signature, constants, warps, stages, aligned, None, stack)
