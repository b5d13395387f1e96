"""``specattn eval humaneval``."""

from __future__ import annotations

from typing import Annotated

import typer

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import Data, NewTokens, RunOptions, with_run_options


@with_run_options
def humaneval(
    *,
    data: Data,
    max_new_tokens: NewTokens = 512,
    seconds: Annotated[int, typer.Option(metavar="S", min=1, help="What a program may take.")] = 10,
    options: RunOptions,
) -> None:
    """Functions from their descriptions, checked by running their tests in a process with limits."""
    from specattn.evaluation.tasks.humaneval import HumanEval
    from specattn.evaluation.tasks.options import DataFile

    execute(HumanEval(DataFile(data), max_new_tokens, options.chat, seconds), options)
