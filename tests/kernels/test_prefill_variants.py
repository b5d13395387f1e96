"""The list of what to compile is what the launcher launches; keys and values are fetched ahead."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from specattn.kernels.blocks import BlockGrid, BlockLists
from specattn.kernels.int8_blocks import quantise_blocks

if importlib.util.find_spec("triton") is None:
    pytest.skip("no triton to compile with", allow_module_level=True)

from specattn.kernels import block_sparse_attention_triton as triton_module
from specattn.kernels.block_sparse_launch import block_sparse_attention
from specattn.kernels.prefill_variants import PATTERNS, SPARGE, variants

ABSENT = ("query_scales", "key_scales", "lam")


def entry(options: dict[str, object]) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(options.items()))


def test_the_variants_are_what_is_launched(monkeypatch):
    launched: set[tuple[object, ...]] = set()

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*arguments: object, **options: object) -> None:
                launched.add((*(part is None for part in arguments[3:6]), entry(options)))

            return launch

    monkeypatch.setattr(triton_module, "block_sparse_kernel", Recorder())
    for head_dim, int8 in SPARGE:
        launch(head_dim, 128, 64, int8=int8, lam=torch.ones(2))
    for head_dim, block in PATTERNS:
        launch(head_dim, block, block, row_group=block)
    listed = set()
    for _, _, constants, warps, stages, *_ in variants():
        options = {name: value for name, value in constants.items() if name not in ABSENT}
        options |= {"num_warps": warps, "num_stages": stages}
        listed.add((*(name in constants for name in ABSENT), entry(options)))
    assert listed == launched


def launch(head_dim: int, query_block: int, key_block: int, int8: bool = False, **options: object) -> None:
    query, key, value = torch.randn(3, 1, 2, 40, head_dim, dtype=torch.bfloat16)
    scales = None
    if int8:
        (query, query_scales), (key, key_scales) = (
            quantise_blocks(part, size) for part, size in ((query, query_block), (key, key_block))
        )
        scales = (query_scales, key_scales)
    grid = BlockGrid(40, 40, 0, query_block, key_block)
    mask = torch.ones(1, 2, grid.query_blocks, grid.key_blocks, dtype=torch.bool)
    lists = BlockLists.from_mask(mask, query_block, key_block)
    block_sparse_attention(query, key, value, lists, start=0, scaling=1.0, scales=scales, **options)


def test_signatures_name_every_argument():
    for kernel, signature, constants, _, _, aligned, *_ in variants():
        assert list(signature) == list(kernel.arg_names)
        assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constants)
        assert set(aligned) <= set(signature) - set(constants)


# In a process of its own: here the kernels may be those of the interpreter.
COMPILE = """
import sys
from specattn.kernels.compilation import compile_variant
from specattn.kernels.prefill_variants import variants

(variant,) = (v for v in variants() if v.constants["HEAD_DIM"] == 128 and v.signature["query"] == "*i8")
compiled = compile_variant(variant, int(sys.argv[1]))
ptx = compiled.asm["ptx"]
products = "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" if sys.argv[1] == "90" else "s32.s8.s8.s32"
print(ptx.count("cp.async.cg.shared.global"), products in ptx, compiled.metadata.shared)
"""


@pytest.mark.parametrize("arch,kilobytes", [(80, 164), (90, 228)])
def test_integers_go_to_the_matrix_units_and_tiles_are_fetched_ahead(arch, kilobytes):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    copies, products, shared = run.stdout.split()
    # A thread copies keys in two pieces and values in four, before and within each of two loops.
    assert int(copies) >= 20 and products == "True"
    assert 2 * (int(shared) + 1024) <= kilobytes * 1024
