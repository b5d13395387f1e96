"""How a kernel is compared with its reference."""

from __future__ import annotations

import torch
from torch import Tensor


def error_ratio(out: Tensor, reference: Tensor) -> float:
    """``||out - reference|| / ||reference||`` in float64; NaN if either holds one, so that no bound accepts it."""
    out, reference = out.double(), reference.double()
    tiny = torch.finfo(torch.float64).tiny
    return float((out - reference).norm() / reference.norm().clamp(min=tiny))
