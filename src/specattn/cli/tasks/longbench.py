"""``specattn eval longbench`` and ``longbench2``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import RunOptions, given, with_run_options
from specattn.cli.tasks.published import Data, Longest


@with_run_options
def longbench(
    *,
    data: Data = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="One of the 21 data sets. Repeatable.", show_default="all"),
    ] = None,
    longest: Longest = 0,
    options: RunOptions,
) -> None:
    """The 21 data sets of LongBench: questions, summaries, few-shot learning, retrieval, code.

    With --chat few-shot examples and code still come without a chat template, as published.
    """
    from specattn.evaluation.tasks.longbench import LongBench
    from specattn.evaluation.tasks.options import DataFile, Names

    asked = given(data=data and DataFile(data), datasets=dataset and Names(dataset))
    execute(LongBench(longest=longest, chat=options.chat, **asked), replace(options, chat=False))


@with_run_options
def longbench2(
    *,
    data: Data = None,
    length: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="short, medium or long. Repeatable.", show_default="all"),
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="NAME", help="Groups: length, difficulty, domain, or none.")
    ] = "none",
    longest: Longest = 0,
    options: RunOptions,
) -> None:
    """LongBench v2: multiple-choice questions about texts of 8K to 2M words."""
    from specattn.evaluation.tasks.longbench2 import LongBench2
    from specattn.evaluation.tasks.options import DataFile, Names

    asked = given(data=data and DataFile(data), lengths=length and Names(length))
    execute(LongBench2(by=by, longest=longest, **asked), options)
