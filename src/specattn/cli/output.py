"""Where results go: JSON to stdout, what people read to stderr, files where they can be written."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

LOG_WIDTH = 140
"""Columns where the output is not a terminal."""


def console(*, stderr: bool = True) -> Console:
    """Where people read: stderr, so that stdout stays clean."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else LOG_WIDTH, highlight=False, markup=False)


def print_json(document: dict[str, Any]) -> None:
    """The document as the last line of stdout; figures that JSON cannot say become null."""
    sys.stdout.write(json.dumps(_finite(document)) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        UsageError: if its folder does not exist or cannot be written to.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: the folder {folder} does not exist; create it")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written; choose another place")


def check_plot(path: Path | None) -> None:
    """Refuse a picture that could not be drawn or written.

    Raises:
        UsageError: as :func:`check_output`, and if matplotlib is missing or cannot write such a file.
    """
    if path is None:
        return
    check_output(path, "--plot")
    if find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib: pip install "specattn[plot]"')
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.filetypes)
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise UsageError(f"--plot {path}: {path.suffix or 'no ending'!r} is not one of {', '.join(kinds)}")


def check_new(path: Path, option: str, *, force: bool) -> None:
    """The same, and refuse to replace a file unless ``force`` says so.

    Raises:
        UsageError: as :func:`check_output`, or if the file exists.
    """
    check_output(path, option)
    if path.exists() and not force:
        raise UsageError(f"{option} {path} exists; choose another name, or replace it with --force")
