"""Run a program under the guard and say whether it came to its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from specattn.errors import UsageError

GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: processor time, and wall time.
        memory: bytes of address space.
        file_size: bytes of a file that it writes.
    """

    seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """Whether a program came to its end without an error, and if not, why."""

    passed: bool
    reason: str = ""


def run_python(program: str, limits: Limits | None = None) -> Verdict:
    """Run Python code; a program that leaves before its last line has not passed.

    Raises:
        UsageError: on a system without resource limits.
    """
    if os.name != "posix":
        raise UsageError("running generated code needs a POSIX system for its limits; use Linux or macOS")
    limits = limits or Limits()
    with TemporaryDirectory(prefix="specattn-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # The program cannot know the word that it has to leave behind.
        word, mark = secrets.token_hex(16), folder / "passed"
        ending = f"\nwith open({str(mark)!r}, 'w') as _file:\n    _file.write({word!r})\n"
        (folder / "program.py").write_text(program + ending, encoding="utf-8", errors="replace")
        code = _run(folder, limits)
        if code == 0 and mark.is_file() and mark.read_bytes() == word.encode():
            return Verdict(True)
        return Verdict(False, _reason(code, folder, limits))


def _run(folder: Path, limits: Limits) -> int | None:
    """The exit code; ``None`` if the wall time was up."""
    numbers = [str(number) for number in (limits.seconds, limits.memory, limits.file_size)]
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), str(folder / "program.py"), *numbers],
            cwd=folder,
            env={"HOME": str(folder), "TMPDIR": str(folder), "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            return process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(code: int | None, folder: Path, limits: Limits) -> str:
    if code is None:
        return f"ran past {limits.seconds} s"
    lines = (folder / "errors").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if lines:
        return lines[-1]
    number = -code if code < 0 else code - 128
    if number > 0:
        return (
            f"killed by {signal.Signals(number).name}"
            if number in set(signal.Signals)
            else f"exit code {code}"
        )
    return "left before its last line" if code == 0 else f"exit code {code}"
