"""``python -m specattn.kernels.compilation``: compile the Triton kernels without a GPU, and say what they take.

A kernel that is to be looked at has a module in ``MODULES``, whose ``variants()`` yields what its launcher would
compile. The process must not have ``TRITON_INTERPRET`` set: then ``triton.jit`` gives nothing that can be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from specattn.errors import UsageError

MODULES = (
    "specattn.kernels.decoder_variants",
    "specattn.kernels.draft_variants",
    "specattn.kernels.nucleus_variants",
    "specattn.kernels.paged_attention_variants",
    "specattn.kernels.prefill_variants",
)
ARCHITECTURES = (80, 90)
"""Compute capabilities: A100, and H100 or H200."""


class Variant(NamedTuple):
    """One way in which a kernel is compiled.

    Attributes:
        kernel: a function of ``triton.jit``.
        signature: for each parameter in order its type, such as ``*fp32`` and ``i32``, or ``constexpr``.
        constants: values of the ``constexpr`` parameters.
        warps, stages: of a program.
        aligned: parameters that are multiples of 16 (bytes, if pointers).
        registers: the most that a thread may have, if the launcher limits them.
        stack: bytes that a thread may spill.
        least: the compute capability from which on it is compiled.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = ()
    registers: int | None = None
    stack: int = 0
    least: int = 80


class Usage(NamedTuple):
    """What a compiled kernel takes: registers and bytes of stack a thread, bytes of shared memory a program."""

    registers: int
    stack: int
    shared: int


def variants() -> Iterator[Variant]:
    """The registered ones."""
    for module in MODULES:
        for variant in import_module(module).variants():
            yield Variant(*variant)


def compile_variant(variant: Variant, architecture: int) -> Any:
    """The compiled kernel, with ``asm`` and ``metadata``.

    Raises:
        UsageError: kernels are interpreted in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 is set: unset it, interpreted kernels cannot be compiled")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {
        (list(variant.signature).index(name),): [["tt.divisibility", 16]] for name in variant.aligned
    }
    source = ASTSource(variant.kernel, variant.signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if variant.registers is not None:
        options["maxnreg"] = variant.registers
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(compiled: Any) -> Usage:
    """What ``cuobjdump``, which comes with Triton, says about a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", report)}
    return Usage(found["REG"], found["STACK"], compiled.metadata.shared)


def main(architectures: list[int]) -> int:
    """Print a table; the exit status is 1 if a kernel spills more than it may."""
    row = "{:<28} {:>4} {:>6} {:>10} {:>6} {:>7}  {}"
    print(row.format("kernel", "sm", "warps", "registers", "stack", "shared", "constants"))
    failed = False
    for variant in variants():
        for architecture in (one for one in architectures if one >= variant.least):
            found = usage(compile_variant(variant, architecture))
            constants = " ".join(f"{name}={_short(value)}" for name, value in variant.constants.items())
            figures = [found.registers, found.stack, found.shared]
            print(
                row.format(variant.kernel.__name__, architecture, variant.warps, *figures, constants),
                flush=True,
            )
            failed |= found.stack > variant.stack
    return int(failed)


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    try:
        sys.exit(main([int(argument) for argument in sys.argv[1:]] or list(ARCHITECTURES)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
