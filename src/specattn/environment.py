"""What a result was measured with: versions, processor, GPU. No host names, user names or paths."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import specattn

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "triton")


def environment(
    device: torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, str | int | None]:
    """The environment of a run on ``device`` with models of ``dtype``; without them, of this installation."""
    import torch

    found: dict[str, str | int | None] = {
        "specattn": specattn.__version__,
        "python": platform.python_version(),
    }
    found |= {name: number for name in PACKAGES if (number := _version(name)) is not None}
    found |= {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device is not None:
        found["device"] = str(device)
    if dtype is not None:
        found["dtype"] = str(dtype).removeprefix("torch.")
    if device is None or device.type == "cuda":
        found |= _gpu(device)
    return found


def _gpu(device: torch.device | None) -> dict[str, str | int | None]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
