"""Where the Triton kernels run."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

LEAST_CAPABILITY = (8, 0)
"""Compute capability of an A100."""


KERNELS = "SPECATTN_KERNELS"
"""Environment variable: ``all`` turns on kernels that no GPU has run yet."""


def has_kernels(device: torch.device) -> bool:
    """Whether prefill, Quest and Twilight take their kernels on ``device``, and not PyTorch.

    They have passed their tests in Triton's interpreter and compile for GPUs, and none has run them through. Until one
    has, they are asked for.
    """
    return os.environ.get(KERNELS) == "all" and can_run_kernels(device)


@cache
def can_run_kernels(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that is new enough, and triton is there to compile for it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )
