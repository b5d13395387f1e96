"""``specattn eval specbench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.output import console
from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import RunOptions, with_run_options

if TYPE_CHECKING:
    from rich.table import Table


@with_run_options
def specbench(
    *,
    data: Annotated[
        Path, typer.Option("--data", metavar="PATH", help="Spec-Bench's question.jsonl, or its folder.")
    ],
    tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Of an answer.")] = 1024,
    options: RunOptions,
) -> None:
    """Accepted lengths and speed on the first turns of Spec-Bench, by category."""
    from specattn.evaluation.tasks.options import DataFile
    from specattn.evaluation.tasks.specbench import SpecBench

    folder = execute(SpecBench(data=DataFile(data), max_new_tokens=tokens), options)
    console().print(by_category(folder.summary()["methods"]))


def by_category(methods: dict[str, dict[str, Any]]) -> Table:
    """A row for each method and category: tokens a round, and tokens a second."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="by category", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    table.add_column("category")
    for heading in ("samples", "tokens a round", "tokens/s"):
        table.add_column(heading, justify="right")
    for method, figures in methods.items():
        for category, row in figures["groups"].items():
            speed = f"{row['tokens_per_second']:.1f}"
            table.add_row(method, category, str(row["samples"]), f"{row['accepted_mean'] + 1:.2f}", speed)
    return table
