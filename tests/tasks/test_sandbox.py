"""Programs under the guard: what passes, and what each limit stops."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from specattn.evaluation.tasks.sandbox import Limits, Verdict, run_python

SHORT = Limits(seconds=1)


def namespaces() -> bool:
    """Whether this kernel gives user namespaces to this user."""
    tool = shutil.which("unshare")
    return bool(tool) and subprocess.run([tool, "-Urnpf", "true"], capture_output=True).returncode == 0


def test_a_program_that_ends_has_passed() -> None:
    assert run_python("import math, typing, collections\nassert math.pi > 3") == Verdict(True)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "left before its last line"),
        ("import os; os._exit(0)", "left before its last line"),
        ("import os; os._exit(3)", "exit code 3"),
        ("x = '\0'", "SyntaxError"),
    ],
)
def test_what_does_not_pass(program: str, reason: str) -> None:
    verdict = run_python(program)
    assert not verdict.passed and reason in verdict.reason


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_is_stopped(program: str) -> None:
    started = monotonic()
    verdict = run_python(program, SHORT)
    assert not verdict.passed and verdict.reason in ("ran past 1 s", "killed by SIGKILL", "killed by SIGXCPU")
    assert monotonic() - started < 10


def test_memory_has_an_end() -> None:
    verdict = run_python("x = bytearray(400 << 20)", Limits(memory=256 << 20))
    assert verdict == Verdict(False, "MemoryError")
    assert run_python("x = bytearray(400 << 20)").passed


def test_a_file_has_an_end() -> None:
    big = "open('big', 'wb').write(bytes({}))"
    assert "File too large" in run_python(big.format(2 << 20)).reason
    assert run_python(big.format(1 << 19)).passed


def test_it_works_in_a_folder_that_is_gone_afterwards(tmp_path: Path) -> None:
    note = tmp_path / "note"
    assert run_python(
        f"import os\nopen({str(note)!r}, 'w').write(os.getcwd())\nopen('mine', 'w').close()"
    ).passed
    folder = Path(note.read_text())
    assert folder.name.startswith("specattn-") and not folder.exists()


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert run_python(
        "import os, sys\nassert 'SECRET_TOKEN' not in os.environ\nassert sys.flags.isolated"
    ).passed
    assert "ModuleNotFoundError" in run_python("import copy_task").reason


@pytest.mark.parametrize("ends", [True, False])
def test_processes_do_not_outlive_it(tmp_path: Path, ends: bool) -> None:
    mark = tmp_path / "alive"
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1.5)
    open({str(mark)!r}, "w").close()
    os._exit(0)
{"" if ends else "os.setsid() if os.getpid() != os.getpgid(0) else None; time.sleep(30)"}
"""
    verdict = run_python(program, SHORT)
    sleep(1.0 if not ends else 1.8)
    assert not mark.exists(), verdict


def test_there_is_no_network_where_namespaces_can_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection({server.getsockname()}, timeout=1)"
        assert subprocess.run([sys.executable, "-c", connect]).returncode == 0
        assert run_python(connect).passed != namespaces()
