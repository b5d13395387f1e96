"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from specattn.errors import UsageError


def write_file(path: Path, content: bytes, what: str) -> None:
    """Write to a file beside ``path``, then rename it: a reader never sees a part of it.

    Raises:
        UsageError: if the file cannot be written; ``what`` says what it was to hold.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {what} to {path}: {reason}; choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
