"""The gate of a SwiGLU layer: ``silu(gate) * up`` from the merged product of both."""

from __future__ import annotations

import torch
from torch import Tensor


def gated(gate_up: Tensor) -> Tensor:
    """``[rows, 2 * width]``, gates then values, to ``[rows, width]``."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
