"""Where a run took place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def machine(environment: Mapping[str, Any]) -> str:
    """A run's environment in a few words."""
    parts = [
        environment.get("gpu") or environment.get("cpu"),
        environment.get("dtype"),
        *(f"{name} {environment[name]}" for name in ("specattn", "torch") if name in environment),
    ]
    return ", ".join(str(part) for part in parts if part)
