"""How a command fails: one line on stderr and an exit code; the traceback with ``--debug``."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperCommand

from specattn.errors import SpecAttnError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""


class Command(TyperCommand):
    """A command whose failures have the exit codes of :mod:`specattn.errors`; 1 for unexpected ones."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        # Exit is no failure, and a reader that closed the pipe has what it wanted: typer sees to both.
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            debug = bool(ctx.params.get("debug"))
            if debug:
                traceback.print_exc()
            typer.echo(f"error: {_describe(error, debug)}", err=True)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


def _describe(error: Exception, debug: bool) -> str:
    if isinstance(error, SpecAttnError):
        return str(error)
    reason = (str(error).strip().splitlines() or [""])[0]
    hint = "" if debug else " (run again with --debug for the traceback)"
    return f"{type(error).__name__}: {reason}{hint}" if reason else f"{type(error).__name__}{hint}"
