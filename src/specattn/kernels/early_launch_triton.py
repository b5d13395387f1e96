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
from triton.language.extra import cuda


@triton.jit
def wait_for_launch_before():
    """Until all is written that this launch reads; it must have been launched early."""
    cuda.gdc_wait()


@triton.jit
def let_next_start():
    """If that is an early launch. What this one still writes is there when the next one has waited."""
    cuda.gdc_launch_dependents()
