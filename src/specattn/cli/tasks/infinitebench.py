"""``specattn eval infinitebench``."""

from __future__ import annotations

from typing import Annotated

import typer

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import RunOptions, given, with_run_options
from specattn.cli.tasks.published import Data, Longest


@with_run_options
def infinitebench(
    *,
    data: Data = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="One of the 12 tasks. Repeatable.", show_default="all"),
    ] = None,
    longest: Longest = 0,
    options: RunOptions,
) -> None:
    """The 12 tasks of InfiniteBench, over 100K tokens: retrieval, books, dialogues, mathematics, code."""
    from specattn.evaluation.tasks.infinitebench import InfiniteBench
    from specattn.evaluation.tasks.options import DataFile, Names

    asked = given(data=data and DataFile(data), tasks=task and Names(task))
    execute(InfiniteBench(longest=longest, **asked), options)
