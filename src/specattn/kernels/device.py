"""Where the Triton kernels run."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

LEAST_CAPABILITY = (8, 0)
"""Compute capability of an A100."""


def multiprocessors(device: torch.device, elsewhere: int = 1) -> int:
    """How many ``device`` has; Triton's interpreter counts as ``elsewhere``."""
    if device.type != "cuda":
        return elsewhere
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; Triton's interpreter counts as one like an H100's."""
    if device.type != "cuda":
        return 228 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that is new enough, and triton is there to compile for it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )


@cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on ``device`` can overlap: programmatic dependent launches came with Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
