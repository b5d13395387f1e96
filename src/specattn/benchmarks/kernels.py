"""The benchmarks of single operations, run one after the other into one report."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from specattn.benchmarks.report import Report
from specattn.errors import UsageError

OPERATIONS = ("nucleus", "verify", "decode_attention", "prefill")
"""Each is a module of this package with ``run(report, bandwidth, quick)``."""


def check_operations(names: Sequence[str]) -> Sequence[str]:
    """The operations of these names; all if there are none.

    Raises:
        UsageError: a name is not one of them.
    """
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise UsageError(f"unknown operation {unknown[0]!r}: choose from {', '.join(OPERATIONS)}")
    return names or OPERATIONS


def check_gpu() -> None:
    """Refuse to run where the kernels cannot.

    Raises:
        UsageError: there is no triton, no CUDA GPU, or one older than an A100.
    """
    import torch

    from specattn.kernels.device import LEAST_CAPABILITY

    if importlib.util.find_spec("triton") is None:
        raise UsageError("there is no triton here, and the kernels need it: pip install triton")
    if not torch.cuda.is_available():
        raise UsageError(
            f"no CUDA GPU was found by torch {torch.__version__}, and the kernels need one: run on a machine "
            f"with a GPU, its driver and a CUDA build of torch"
        )
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise UsageError(
            f"{torch.cuda.get_device_name()} has compute capability {_dotted(capability)}, and the kernels need "
            f"{_dotted(LEAST_CAPABILITY)}: run on an A100 or newer"
        )


def run(operations: Sequence[str], *, quick: bool) -> Report:
    """Check and time the named operations."""
    from specattn.benchmarks.timing import copy_bandwidth

    report = Report()
    bandwidth = copy_bandwidth()
    for name in operations:
        report.benchmark = name
        benchmark: Any = import_module(f"specattn.benchmarks.{name}")
        benchmark.run(report, bandwidth, quick)
    return report


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
