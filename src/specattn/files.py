"""Files that are written whole or not at all, and JSON files that say what they hold."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specattn.errors import UsageError

TEMPORARY = ".tmp"


def write_file(path: Path, content: bytes, what: str) -> None:
    """Write to a file beside ``path``, then rename it: a reader never sees a part of it.

    Raises:
        UsageError: if the file cannot be written; ``what`` says what it was to hold.
    """
    with _written_beside(path, content, what) as temporary:
        temporary.replace(path)


def write_new(path: Path, content: bytes, what: str) -> bool:
    """The same for a file that must not be there yet: of several processes one writes it, whole.

    Returns:
        Whether it was written; a file that is there stays.

    Raises:
        UsageError: as :func:`write_file`.
    """
    with _written_beside(path, content, what) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            # A file system without links cannot keep two processes apart.
            if path.exists():
                return False
            temporary.replace(path)
    return True


def is_temporary(path: Path) -> bool:
    """Whether a file is one that is still being written, or was when its process was killed."""
    return path.name.startswith(".") and path.suffix == TEMPORARY


@contextlib.contextmanager
def _written_beside(path: Path, content: bytes, what: str) -> Iterator[Path]:
    """A file beside ``path`` that holds ``content``, as long as the block does not rename it."""
    # Process numbers are not enough: hosts that share the folder have their own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {what} to {path}: {reason}; choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclass(frozen=True)
class Format:
    """A JSON file that a command makes for a model.

    Attributes:
        kind, version: what the file says of itself.
        what: what it holds, for messages.
        command: what makes it.
    """

    kind: str
    version: int
    what: str
    command: str

    def write(self, path: Path, content: dict[str, Any]) -> None:
        """Write ``content``, all of it or nothing.

        Raises:
            UsageError: if the file cannot be written.
        """
        text = json.dumps({"kind": self.kind, **content}) + "\n"
        write_file(path, text.encode(), f"the {self.what}")

    def read(self, path: Path) -> dict[str, Any]:
        """What :meth:`write` wrote.

        Raises:
            UsageError: if the file is missing or unreadable, or of another kind or version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read the {self.what} {path}: {error.strerror or error}; make them with `{self.command}`"
            ) from error
        except ValueError:
            raise self.damaged(path) from None
        if not isinstance(content, dict) or content.pop("kind", None) != self.kind:
            raise self.damaged(path)
        if content.get("version") != self.version:
            raise UsageError(
                f"{path} has version {content.get('version')}; this specattn reads version {self.version}: tune again"
            )
        return content

    def damaged(self, path: Path) -> UsageError:
        """The error of a file that holds something else."""
        return UsageError(f"{path} holds no {self.what} or is damaged; make them with `{self.command}`")
