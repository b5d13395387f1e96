"""Checks of option values that several methods share."""

from __future__ import annotations

from collections.abc import Collection

from specattn.errors import UsageError


def check_probability(method: str, option: str, value: float, example: float = 0.95) -> None:
    """Refuse a value outside (0, 1]."""
    if not 0 < value <= 1:
        raise UsageError(f"{method}: {option}={value} is outside (0, 1]; use for example {option}={example}")


def check_inside(method: str, option: str, value: float) -> None:
    """Refuse a value outside (0, 1), ends excluded."""
    if not 0 < value < 1:
        raise UsageError(f"{method}: {option}={value} is outside (0, 1); use for example {option}=0.05")


def check_choice(method: str, option: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is not one of ``choices``."""
    if value not in choices:
        raise UsageError(f"{method}: {option}={value!r} is unknown; choose one of {', '.join(choices)}")


def check_at_least(method: str, option: str, value: float, least: float) -> None:
    """Refuse a value below ``least``."""
    if value < least:
        raise UsageError(f"{method}: {option}={value} is below {least}")


def check_forced(method: str, sink: int, window: int) -> None:
    """Refuse a negative number of first or most recent tokens that are always read."""
    check_at_least(method, "sink", sink, 0)
    check_at_least(method, "window", window, 0)
