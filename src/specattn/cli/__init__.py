"""The command line: one module a subcommand. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for wrong usage, 1 for a failed run, 130 after Ctrl-C."""
    from specattn.cli.app import app

    app(arguments, prog_name="specattn")
