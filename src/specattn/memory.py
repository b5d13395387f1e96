"""How much memory is there, and how to say so."""

from __future__ import annotations

import torch


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Blocks that PyTorch holds but nobody uses are as good as free.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    import psutil

    return int(psutil.virtual_memory().available)


def peak_bytes(device: torch.device) -> int:
    """The largest amount of memory that this process has used on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shortage(error: torch.OutOfMemoryError) -> str:
    """What an allocation failed with and how much it asked for; torch goes on with its allocator's options."""
    return ". ".join(str(error).strip().splitlines()[0].split(". ")[:2]).rstrip(".")


def human_bytes(count: float) -> str:
    """A byte count as people write it: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
