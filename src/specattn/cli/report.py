"""``specattn report``: what runs measured, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specattn.cli.options import OUTPUT, Debug, Json
from specattn.cli.output import check_output, console, print_json
from specattn.errors import UsageError


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="JSON documents of eval, generate and bench, folders of task runs, mappings (.safetensors).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML page.", rich_help_panel=OUTPUT)] = Path(
        "report.html"
    ),
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Write the tables as Markdown too, beside it.", rich_help_panel=OUTPUT
        ),
    ] = False,
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="The page's heading.", rich_help_panel=OUTPUT)
    ] = "specattn report",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tables and figures of any number of runs, in one HTML page that needs no network."""
    from specattn.files import write_file
    from specattn.report.build import build
    from specattn.report.figures import figures
    from specattn.report.markdown import markdown as as_markdown
    from specattn.report.page import page
    from specattn.report.runs import read_runs

    check_output(out, "--out")
    if markdown and out.suffix == ".md":
        raise UsageError(
            f"--out {out} is where --markdown writes; give the page another ending, such as .html"
        )
    read = read_runs(runs or [])
    content = build(read, title)
    written = [(out, page(content))]
    if markdown:
        written.append((out.with_suffix(".md"), as_markdown(content)))
    for path, text in written:
        write_file(path, text.encode(), "the report")
        console().print(f"wrote {path}")
    if json:
        print_json({"page": str(out), **figures(read)})
