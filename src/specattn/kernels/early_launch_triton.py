# mypy: disable-error-code="no-untyped-def"
"""Launches that begin before the one before them has ended, where :func:`specattn.kernels.device.starts_early`.

A launch lets the next one start when its programs have read what they read, and does the rest beside it. Any earlier,
and the next one's programs, which wait, would take the places of its own, and not as evenly.

Before it waits a launch may read what was written before the launch before it began its work: that one has waited, too,
or was launched when all was written. Who says that a launch may do so must know the launch before it: a copy into a
contiguous tensor or a count that is worked out last would be that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def wait_for_launch_before():
    """Until all is written that this launch reads; it must have been launched early."""
    cuda.gdc_wait()


@triton.jit
def let_next_start():
    """If that is an early launch. What this one still writes is there when the next one has waited."""
    cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers, mask):
    """Bring the lines of memory that are pointed to into L2: nothing is waited for, and no value read.

    The interpreter cannot do that.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred %p; setp.ne.b32 %p, $2, 0; @%p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [pointers, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
