"""``specattn eval needle``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specattn.cli.options import OUTPUT
from specattn.cli.output import check_plot
from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import Lengths, RunOptions, SamplesEach, Seed, given, with_run_options


@with_run_options
def needle(
    *,
    length: Lengths = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            "--depth", metavar="PERCENT", min=0, max=100, help="Where the needle stands. Repeatable."
        ),
    ] = None,
    samples: SamplesEach = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The haystack, a text file.", show_default="made-up text", dir_okay=False
        ),
    ] = None,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a heat map, depth by length.", rich_help_panel=OUTPUT),
    ] = None,
    options: RunOptions,
) -> None:
    """A sentence with a number at given depths of texts of given lengths."""
    from specattn.evaluation.tasks.heat_map import plot_heat_map
    from specattn.evaluation.tasks.needle import Needle
    from specattn.evaluation.tasks.options import DataFile, Integers

    check_plot(plot)
    asked = given(
        length=length and Integers(length),
        depth=depth and Integers(depth),
        samples_each=samples,
        text=text and DataFile(text),
    )
    folder = execute(Needle(seed=seed, **asked), options)
    if plot is not None:
        plot_heat_map(folder, plot)
