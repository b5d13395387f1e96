"""``specattn bench``: how fast it is, beside its peers."""

from __future__ import annotations

import json as json_module
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
    _print(report, document)
    if out is not None:
        out.write_text(json_module.dumps(document, indent=1) + "\n", encoding="utf-8")
    if json:
        print_json(document)
    if report.gate != "passed":
        raise typer.Exit(1)


def _print(report: Report, document: dict[str, Any]) -> None:
    """Tables of the timings; of the checks that failed, if any did."""
    screen = console()
    for name in dict.fromkeys(row["benchmark"] for row in document["rows"]):
        screen.print(_table(name, [row for row in document["rows"] if row["benchmark"] == name]))
    for key, value in document["ratios"].items():
        screen.print(f"{key}: {value:.2f}")
    for check in report.failures:
        screen.print(f"failed: {check.name}: error {check.error:.3g}, bound {check.bound:.3g}")
    screen.print(
        f"correctness gate: {report.gate}" + ("" if document["rows"] else "; no timings are reported")
    )


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row if name != "benchmark"))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
