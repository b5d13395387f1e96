# mypy: disable-error-code="no-untyped-def"
"""Memory that will be read soon."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(pointers, mask=None):
    """Have the lines of memory that are pointed to brought into L2: nothing is waited for, and no value read.

    The interpreter cannot do that.
    """
    if mask is None:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $2, 0; @%p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [pointers, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
