"""``specattn bench``: how fast it is, beside its peers."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.options import OUTPUT, Debug, Json
from specattn.cli.output import check_output, console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from specattn.benchmarks.report import Report


def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option("--op", metavar="NAME", help="An operation; all by default. Repeatable."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the JSON document here.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the GPU kernels beside their peers, after checking what they compute. Needs a CUDA GPU."""
    from specattn.benchmarks.kernels import check_gpu, check_operations, run

    operations = check_operations(op or [])
    if out is not None:
        check_output(out, "--out")
    check_gpu()
    report = run(operations, quick=quick)
    chosen = [f"--op {name}" for name in op or []] + ["--quick"] * quick
    document = report.document(" ".join(["specattn bench kernels", *chosen]))
    for name in dict.fromkeys(row["benchmark"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["benchmark"] == name]
        columns = dict.fromkeys(column for row in rows for column in row if column != "benchmark")
        console().print(table(name, rows, list(columns)))
    publish(report, document, out, json=json)


def publish(report: Report, document: dict[str, Any], out: Path | None, *, json: bool) -> None:
    """Print ratios and checks that failed, write the document where it was asked for, and exit with 1 if any did."""
    screen = console()
    for key, value in document["ratios"].items():
        screen.print(f"{key}: {value:.2f}")
    for check in report.failures:
        screen.print(f"failed: {check.name}: error {check.error:.3g}, bound {check.bound:.3g}")
    screen.print(
        f"correctness gate: {report.gate}" + ("" if document["rows"] else "; no timings are reported")
    )
    if out is not None:
        out.write_text(json_module.dumps(document, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(document)
    if report.gate != "passed":
        raise typer.Exit(1)


def table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Table:
    """These columns of ``rows``, empty where a row has none of them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(row.get(name)) for name in columns))
    return made


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
