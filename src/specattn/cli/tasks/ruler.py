"""``specattn eval ruler``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import Lengths, RunOptions, SamplesEach, Seed, given, with_run_options


@with_run_options
def ruler(
    *,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="One of the 13 tasks. Repeatable.", show_default="all"),
    ] = None,
    length: Lengths = None,
    samples: SamplesEach = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The essay haystack, a text file.", show_default="made-up text"),
    ] = None,
    qa: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A JSON file of SQuAD (qa_1) or HotpotQA (qa_2). Repeatable."),
    ] = None,
    seed: Seed = 0,
    options: RunOptions,
) -> None:
    """The 13 tasks of RULER: needles, variable tracking, common and frequent words, questions."""
    from specattn.evaluation.tasks.options import DataFile, Integers, Names
    from specattn.evaluation.tasks.ruler import Ruler

    asked = given(
        task=task and Names(task),
        length=length and Integers(length),
        samples_each=samples,
        text=text and DataFile(text),
        qa=qa and Names(map(str, qa)),
    )
    execute(Ruler(seed=seed, **asked), options)
