"""What a GPU would compile of the draft's kernels and Quest's, so that it can be compiled where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from specattn.kernels.compilation import Variant
from specattn.kernels.export_attention_triton import export_attention_kernel
from specattn.kernels.head_mixture_triton import head_mixture_kernel
from specattn.kernels.page_bounds_triton import page_bounds_kernel
from specattn.kernels.page_scores import BLOCK as SCORED_PAGES
from specattn.kernels.page_scores_triton import page_scores_kernel
from specattn.kernels.quantised_keys_triton import quantise_keys_kernel
from specattn.kernels.quantised_round_scores import BEHIND, choose_tiles
from specattn.kernels.quantised_round_scores_triton import quantised_round_scores_kernel
from specattn.kernels.quantised_scores_triton import quantised_scores_kernel
from specattn.kernels.round_scores import TILE_TOKENS, TILES, round_stages, round_warps
from specattn.kernels.round_scores import blocks as round_blocks
from specattn.kernels.round_scores_triton import round_scores_kernel
from specattn.kernels.split_kv import block_rows, tile_tokens
from specattn.kernels.value_attention import stages as value_stages
from specattn.kernels.value_attention_triton import value_attention_kernel

POINTERS = {
    "block_table": "*i32",
    "slots": "*i64",
    "lengths": "*i32",
    "rows": "*i64",
    "indices": "*i32",
    "counts": "*i32",
    "entries": "*i64",
    "due": "*i1",
    "filled": "*i32",
    "places": "*i32",
    "arrivals": "*i32",
    "parts": "*fp32",
    "part_lse": "*fp32",
    "lse": "*fp32",
    "lse_out": "*fp32",
    "export_lse": "*fp32",
    "weights": "*fp32",
    "codes": "*i8",
    "logits": "*fp16",
    "logits_in": "*fp16",
    "logits_out": "*fp16",
    "export_logits": "*fp16",
}
"""Those that have the same type for every cache."""

ALIGNED = (
    "query_batch",
    "query_row",
    "query_head",
    "query_layer",
    "pool_size",
    "pool_layer",
    "pool_row",
    "bound_page",
    "bound_head",
    "length",
    "out_length",
    "logits_length",
    "export_length",
    "logits_batch",
    "logits_row",
    "logits_head",
    "export_batch",
    "export_head",
    "heads_batch",
    "heads_head",
    "own_slot",
    "own_head",
)
"""Numbers that are multiples of 16, as pointers are of 16 bytes; without them loads and stores are narrow."""

FEW_BYTES = 8
MANY_ROWS_BYTES = 576
"""What may spill: nine rows of a group of eight do not fit into an A100's registers as well as into an H100's.
Triton 3.6 spills up to 352 bytes there, 3.7.1 up to 560."""

# rows, query heads, KV heads, channels: Qwen2.5-0.5B and Llama-3.2-1B, and the extremes of what is taken
SHAPES = [(1, 14, 2, 64), (2, 32, 8, 64), (1, 4, 1, 256), (9, 64, 8, 128)]
# and five rows, of four steps and one more, whose tiles have room for eight
ROUND_SHAPES = [*SHAPES, (5, 14, 2, 64)]
NO_EXPORT = {"places": None, "logits_out": None, "lse_out": None}
ALL_DUE = {"due": None}


def variants(dtype: str = "bf16") -> Iterator[Variant]:
    """The kernels as their launchers call them, for 16 programs a request and KV head."""
    for shape in SHAPES:
        yield from _attention(dtype, *shape)
    for bits in (4, 8):
        yield _variant(quantise_keys_kernel, dtype, {"D": 64, "BITS": bits, "BLOCK": 32}, {"ranges": "*fp16"})
    yield _variant(page_bounds_kernel, dtype, {"D": 64, "PAGE": 16})
    for rows, query_heads, kv_heads, head_dim in ROUND_SHAPES:
        group = query_heads // kv_heads
        tile_rows, tile_group = round_blocks(rows, group)
        tiles: dict[str, Any] = {"ROWS": rows, "GROUP": group, "KV_HEADS": kv_heads, "D": head_dim}
        tiles |= {"PAGE": 16, "TILES": TILES}
        tiles |= {"BLOCK_R": tile_rows, "BLOCK_G": tile_group, "BLOCK_N": TILE_TOKENS}
        types = dict.fromkeys(("heads_out", "own_out"), "*bf16")
        warps = round_warps(tile_rows * tile_group)
        for due in ({}, ALL_DUE):
            yield _variant(
                round_scores_kernel, dtype, tiles | due, types, warps=warps, stages=round_stages(head_dim, 2)
            )
    for bits in (4, 8):
        for rows, query_heads, kv_heads, head_dim in ROUND_SHAPES:
            for due in ({}, ALL_DUE):
                yield _quantised_round(dtype, bits, rows, query_heads // kv_heads, kv_heads, head_dim, due)
    for heads, tokens, targets in ((64, 128, 64), (512, 16, 16), (16, 128, 16)):
        sizes = {"ROWS": 4, "BLOCK_H": heads, "BLOCK_T": targets, "BLOCK_L": tokens, "PRECISION": "tf32"}
        yield _variant(head_mixture_kernel, dtype, sizes, {"out": "*fp32"}, warps=8, stages=1)


def _quantised_round(
    dtype: str, bits: int, rows: int, group: int, kv_heads: int, head_dim: int, due: dict[str, Any]
) -> Variant:
    tile_rows, tile_group = round_blocks(rows, group)
    tiles = choose_tiles(tile_rows * tile_group, head_dim)
    sizes: dict[str, Any] = {"ROWS": rows, "GROUP": group, "KV_HEADS": kv_heads, "D": head_dim, "BITS": bits}
    sizes |= {"PAGE": 16, "BLOCK_R": tile_rows, "BLOCK_G": tile_group, "BLOCK_N": tiles.tokens}
    sizes |= {"TILES": tiles.count, "BEHIND": BEHIND, "STAGES": tiles.stages, "PTX": True} | due
    types = {"codes": "*i16", "ranges": "*i32", "heads_out": "*bf16", "own_out": "*bf16"}
    return _variant(quantised_round_scores_kernel, dtype, sizes, types, warps=tiles.warps)


def _attention(dtype: str, rows: int, query_heads: int, kv_heads: int, head_dim: int) -> Iterator[Variant]:
    block = block_rows(rows, query_heads, kv_heads)
    tokens = tile_tokens(head_dim, torch.bfloat16)
    sizes: dict[str, Any] = {"ROWS": rows, "GROUP": query_heads // kv_heads, "D": head_dim, "PAGE": 16}
    sizes |= {"BLOCK_M": block, "BLOCK_N": tokens, "BLOCK_S": 16}
    warps = 8 if block > 32 else 4
    dense = sizes | {"BLOCK_S": 8}
    for export in ({}, NO_EXPORT):
        stages = 5 if block <= 32 else 3
        yield _variant(export_attention_kernel, dtype, dense | export, warps=warps, stages=stages)
    pages = {"ROWS": rows, "GROUP": query_heads // kv_heads, "D": head_dim, "BLOCK_D": head_dim}
    pages |= {"BLOCK_M": block, "BLOCK_N": SCORED_PAGES}
    yield _variant(page_scores_kernel, dtype, pages, {"out": "*fp32"})
    yield _variant(value_attention_kernel, dtype, sizes | {"STAGES": value_stages(block)}, warps=warps)
    for bits in (4, 8):
        scores = sizes | {"BITS": bits, "STAGES": 5, "BLOCK_N": min(128, 2 * tokens)}
        yield _variant(quantised_scores_kernel, dtype, scores, {"ranges": "*i32"}, warps=warps)


def _variant(
    kernel: Any,
    dtype: str,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
    warps: int = 4,
    stages: int = 3,
) -> Variant:
    data = dict.fromkeys(("query", "keys", "values", "out", "lower", "upper"), f"*{dtype}")
    known = POINTERS | data | {"scaling": "fp32"} | (types or {}) | dict.fromkeys(constants, "constexpr")
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or name in ALIGNED)
    spills = MANY_ROWS_BYTES if constants.get("BLOCK_M", 0) > 32 else FEW_BYTES
    return Variant(kernel, signature, constants, warps, stages, aligned, stack=spills)
