"""Where the Triton kernels run."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

LEAST_CAPABILITY = (8, 0)
"""Compute capability of an A100."""


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that is new enough, and triton is there to compile for it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )
