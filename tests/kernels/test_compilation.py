"""Every kernel compiles for the GPUs that are named, without one, and keeps to its registers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from specattn.kernels import compilation
from specattn.kernels.compilation import ARCHITECTURES, Usage, Variant, main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton to compile with"
)


def run(*arguments: object, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """The module in a process of its own: here the kernels may be those of the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    command = [sys.executable, "-m", "specattn.kernels.compilation", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_and_spills_no_more_than_it_may(architecture: int) -> None:
    done = run(architecture)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header[:6] == ["kernel", "sm", "warps", "registers", "stack", "shared"]
    assert {row[0] for row in rows} >= {"select_kernel"}
    for row in rows:
        assert row[1] == str(architecture) and 0 < int(row[3]) <= 255, row


def test_interpreted_kernels_are_refused() -> None:
    done = run(90, interpreted=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: TRITON_INTERPRET=1 is set: unset it")


def test_a_variant_that_spills_more_than_it_may_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant(stack: int) -> Variant:
        return Variant(types.SimpleNamespace(__name__="kernel"), {}, {"B": (1, 2)}, stack=stack)

    monkeypatch.setattr(compilation, "compile_variant", lambda variant, architecture: None)
    monkeypatch.setattr(compilation, "usage", lambda compiled: Usage(40, 8, 0))
    for stack, status in ((8, 0), (7, 1)):
        monkeypatch.setattr(compilation, "variants", lambda stack=stack: iter([variant(stack)]))
        assert main([80]) == status
