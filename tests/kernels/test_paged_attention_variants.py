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
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specattn.kernels.paged_attention_variants import attention_variants, early_variants

arch, shared = int(sys.argv[1]), int(sys.argv[2])
for variant in attention_variants(shared) if shared else early_variants():
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
        "order": re.findall(r"griddepcontrol.wait|ld.global|prefetch.global|cp.async.cg|mma.sync", ptx),
    }))
"""


def programs(variant):
    """How many of them are on a multiprocessor at a time."""
    if variant["warps"] == 2:
        return 4
    return 2 if variant["warps"] == 4 and variant["constants"]["BLOCK_N"] < 128 else 1


def compiled(arch, shared):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch), str(shared)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch,kilobytes", [(80, 164), (90, 228)])
def test_defaults_fit_and_fetch_ahead(arch, kilobytes):
    shared = kilobytes * 1024
    found = compiled(arch, shared)
    assert len(found) == 8
    for variant in found:
        assert programs(variant) * (variant["shared"] + 1024) <= shared, variant
        # Keys and values of at least two tiles before the loop and of one in it, 16 bytes a thread at a time.
        assert variant["tiles_ahead"] >= 6 and variant["wide_copies"] >= 12, variant


def test_early_launches_wait_before_they_read_what_the_one_before_writes():
    found = compiled(90, 0)
    assert {variant["constants"]["SETTLED"] for variant in found} == {False, True}
    for variant in found:
        order = variant["order"]
        assert order.count("griddepcontrol.wait") == 1 and variant["tiles_ahead"] >= 6
        before, after = (
            order[: order.index("griddepcontrol.wait")],
            order[order.index("griddepcontrol.wait") + 1 :],
        )
        if not variant["constants"]["SETTLED"]:
            assert not before, variant
            continue
        # The stretch, seven numbers, then slot, count, positions and places; of lists their tokens as well.
        assert set(before) == {"ld.global", "prefetch.global"} and before.count("ld.global") >= 11, variant
        assert before[-1] == "prefetch.global" and "prefetch.global" not in after, variant
        # The query comes first, then keys and values of both tiles before anything is multiplied.
        assert after[0] == "ld.global" and after[: after.index("mma.sync")].count("cp.async.cg") >= 4, variant
