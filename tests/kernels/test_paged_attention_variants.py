"""What GPUs get by default is compiled, without one, and looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton to compile with"
)

# In a process of its own: here the kernels may be those of the interpreter.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specattn.kernels.paged_attention_variants import attention_variants

arch, shared = int(sys.argv[1]), int(sys.argv[2])
for variant in attention_variants(shared):
    attributes = {(list(variant.signature).index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "constants": variant.constants,
        "warps": variant.warps,
        "shared": compiled.metadata.shared,
        "wide_copies": ptx.count("cp.async.cg.shared.global"),
        "tiles_ahead": ptx.count("cp.async.commit_group"),
    }))
"""


def programs(variant):
    """How many of them are on a multiprocessor at a time."""
    if variant["warps"] == 2:
        return 4
    return 2 if variant["warps"] == 4 and variant["constants"]["BLOCK_N"] < 128 else 1


@pytest.mark.parametrize("arch,kilobytes", [(80, 164), (90, 228)])
def test_defaults_fit_and_fetch_ahead(arch, kilobytes):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shared = kilobytes * 1024
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch), str(shared)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 8
    for variant in found:
        assert programs(variant) * (variant["shared"] + 1024) <= shared, variant
        # Keys and values of at least two tiles before the loop and of one in it, 16 bytes a thread at a time.
        assert variant["tiles_ahead"] >= 6 and variant["wide_copies"] >= 12, variant
