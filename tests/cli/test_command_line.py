"""The command line as a whole: it answers fast, fails in one line, and is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command import run

import specattn
from specattn.cli.app import app
from specattn.cli.docs import markdown

ROOT = Path(__file__).parents[2]
COMMANDS = [
    [],
    ["generate"],
    ["calibrate"],
    ["eval"],
    ["eval", "fidelity"],
    ["eval", "perplexity"],
    ["eval", "passkey"],
    ["eval", "needle"],
    ["eval", "ruler"],
    ["eval", "humaneval"],
    ["eval", "gsm8k"],
    ["eval", "longbench"],
    ["eval", "longbench2"],
    ["eval", "infinitebench"],
    ["eval", "specbench"],
    ["tune"],
    ["tune", "sparge"],
    ["tune", "minference"],
    ["bench"],
    ["bench", "kernels"],
    ["bench", "decode"],
    ["report"],
    ["info"],
]
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "tqdm", "tokenizers")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
from specattn.cli import main
for command in {COMMANDS!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*command, "--help"])
        except SystemExit as done:
            assert done.code == 0, done.code
    assert "Usage: specattn" in out.getvalue()
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_no_command_of_the_list_is_forgotten() -> None:
    found = re.findall(r"^## specattn ?(.*)$", markdown(), flags=re.MULTILINE)
    assert sorted(found) == sorted(" ".join(command) for command in COMMANDS)


def test_version() -> None:
    assert run("--version").stdout == f"specattn {specattn.__version__}\n"


def test_the_installed_script_is_main() -> None:
    script = Path(sys.executable).with_name("specattn")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout == f"specattn {specattn.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate hi --methd quest", "--method"),
        ("generate hi --max-new-tokens 0", "--max-new-tokens"),
        ("generate hi --max-new-tokens many", "--max-new-tokens"),
        ("calibrate", "--text"),
        ("calibrate --text a --metric cosine", "--metric"),
        ("eval fidelity --text a --gamma 0", "--gamma"),
        ("eval perplexity --text a --rows 0", "--rows"),
        ("eval passkeys", "passkeys"),
        ("translate", "translate"),
    ],
)
def test_wrong_usage_is_status_2_and_names_what_is_wrong(arguments: str, message: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# Failures that are not ours


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("specattn.environment.environment", broken)


def test_an_unexpected_error_is_status_1_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, RuntimeError("out of luck\nand more lines"))
    result = run("info")
    assert result.exit_code == 1
    assert result.stderr == "error: RuntimeError: out of luck (run again with --debug for the traceback)\n"


def test_an_error_without_a_message_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, MemoryError())
    result = run("info")
    assert (result.exit_code, result.stderr.startswith("error: MemoryError (run again")) == (1, True)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("out of luck"), 1), (specattn.SpecAttnError("lost"), 1), (specattn.UsageError("bad"), 2)],
)
def test_debug_shows_the_traceback_and_keeps_the_status(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    fail(monkeypatch, error)
    assert "Traceback" not in run("info").stderr
    result = run("info", "--debug")
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "raise error" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(str(error))


def test_an_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, KeyboardInterrupt())
    result = run("info", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -c 'from specattn.cli import main; main([\"info\"])' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "error" not in done.stderr and "Traceback" not in done.stderr


# Documentation


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_reference_does_not_depend_on_the_terminal(columns: str) -> None:
    code = "import runpy; runpy.run_module('specattn.cli.docs', run_name='__main__')"
    assert python(code, COLUMNS=columns, TERMINAL_WIDTH=columns, FORCE_COLOR="1") == markdown()


def test_every_option_is_documented() -> None:
    def options(command: object) -> list[str]:
        own = [name for param in command.params for name in param.opts if name.startswith("-")]
        below = getattr(command, "commands", {}).values()
        return own + [name for sub in below for name in options(sub)]

    names, documented = options(typer.main.get_command(app)), markdown()
    assert {"--pair", "--methods", "-o", "--version"} <= set(names)
    assert [name for name in names if f"`{name}" not in documented and f", {name}" not in documented] == []


def test_every_option_has_a_help_text() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |") or "| [" in row] == []
