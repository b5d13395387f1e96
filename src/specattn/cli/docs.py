"""``python -m specattn.cli.docs``: the command line's reference in Markdown, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from specattn.cli.app import app

INTRODUCTION = """\
# Command line

<!-- Written by `python -m specattn.cli.docs`; `make docs` writes it anew. -->

The document of `--json` is the last line of standard output; text for people and progress bars go to standard
error. Exit codes: 0 for success, 1 for a failed run, 2 for input that cannot be right, 130 after Ctrl-C."""


def markdown() -> str:
    """The whole document."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="specattn")
    return "\n\n".join([INTRODUCTION, *_command(context)]) + "\n"


def _command(context: Any) -> Iterator[str]:
    """A command's section, then those of its subcommands."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"## {context.command_path}"
    yield command.help
    yield f"```sh\n{usage}\n```"
    params = [param for param in command.get_params(context) if param.name != "help"]
    for panel in dict.fromkeys(map(_panel, params)):
        yield _table(panel, [param.get_help_record(context) for param in params if _panel(param) == panel])
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from _command(subcommand.context_class(subcommand, info_name=name, parent=context))


def _panel(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or "Option"


def _table(title: str, records: list[tuple[str, str]]) -> str:
    rows = [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in records]
    return "\n".join([f"| {title} | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    typer.echo(markdown(), nl=False)
