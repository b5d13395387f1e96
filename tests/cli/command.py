"""The command line as a function, for the tests."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from specattn.cli.app import app


def run(*arguments: object, **options: Any) -> Result:
    """``specattn`` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def document(result: Result) -> dict[str, Any]:
    """The JSON document: the last line of stdout."""
    assert result.exit_code in (0, 130), result.stderr
    return json.loads(result.stdout.splitlines()[-1])
