"""The command line as a function, for the tests."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from specattn.cli.app import app
from specattn.cli.progress import Bars


def run(*arguments: object, **options: Any) -> Result:
    """``specattn`` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def document(result: Result) -> dict[str, Any]:
    """The JSON document: the last line of stdout."""
    assert result.exit_code in (0, 130), result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def record_progress(monkeypatch: pytest.MonkeyPatch, module: str) -> dict[str, list[int | None]]:
    """What the bars of ``module`` will show: for each thing, how much of it was done, and its total."""
    done: Counter[str] = Counter()
    shown: dict[str, list[int | None]] = {}

    class Recorder(Bars):
        def __call__(self, what: str, count: int) -> None:
            done[what] += count
            shown[what] = [done[what], self._total(what)]

    monkeypatch.setattr(f"{module}.Bars", Recorder)
    return shown


def refused(result: Result, *parts: str, code: int = 2) -> None:
    """The run ended with one line ``error: ...`` that says these things, and nothing on stdout."""
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == code, result.stderr
    assert line.startswith("error: ") and result.stdout == ""
    assert [part for part in parts if part not in line] == []
    assert "Traceback" not in result.stderr
