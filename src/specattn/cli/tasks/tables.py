"""The figures of a run as tables: a row a method, and the scores of the groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specattn.cli.output import console

if TYPE_CHECKING:
    from rich.table import Table

SCORE = ("score", "95 %")
DIFFERENCE = ("- dense", "95 %")
HEADINGS = ("samples", "left out", "KV read", "draft", "accepted", "tokens/s")


def show(summary: dict[str, Any]) -> None:
    """Print the figures for people, and why samples were left out."""
    methods: dict[str, dict[str, Any]] = summary["methods"]
    console().print(_methods_table(summary["task"], summary["metric"], methods))
    groups = sorted({group for figures in methods.values() for group in figures["groups"]}, key=_natural)
    if len(groups) > 1 and summary["metric"]:
        console().print(_groups_table(groups, methods))
    reasons = {reason: n for figures in methods.values() for reason, n in figures["left_out"].items()}
    for reason, count in reasons.items():
        console().print(f"left out: {count}, {reason}")


def _methods_table(task: str, metric: str, methods: dict[str, dict[str, Any]]) -> Table:
    """A row a method; without a metric there is no score to show, without dense answers no difference."""
    compared = bool(metric) and any(figures.get("against_dense") for figures in methods.values())
    headings = (*(SCORE if metric else ()), *(DIFFERENCE if compared else ()), *HEADINGS)
    table = _table(f"{task}: {metric or 'speed'}", "method", headings)
    for name, figures in methods.items():
        cells = [*(_score(figures) if metric else []), *(_difference(figures) if compared else [])]
        table.add_row(name, *cells, *_cells(figures))
    return table


def _score(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['score']:.1%}", _interval(figures["interval"])] if figures["samples"] else ["", ""]


def _difference(figures: dict[str, Any]) -> list[str]:
    against = figures.get("against_dense")
    return [f"{against['difference']:+.1%}", _interval(against["interval"])] if against else ["", ""]


def _cells(figures: dict[str, Any]) -> list[str]:
    left_out = str(sum(figures["left_out"].values()))
    if not figures["samples"]:
        return ["0", left_out, "", "", "", ""]
    return [
        str(figures["samples"]),
        left_out,
        f"{figures['kv_read_fraction']:.1%}",
        f"{figures['draft_read_fraction']:.1%}",
        f"{figures['accepted_mean']:.2f}",
        f"{figures['tokens_per_second']:.1f}",
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def _groups_table(groups: list[str], methods: dict[str, dict[str, Any]]) -> Table:
    table = _table("score by group", "group", tuple(methods))
    for group in groups:
        found = [figures["groups"].get(group) for figures in methods.values()]
        table.add_row(group, *("" if row is None else f"{row['score']:.1%}" for row in found))
    return table


def _table(title: str, first: str, headings: tuple[str, ...]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _natural(text: str) -> list[tuple[int, str]]:
    """An order in which 8192 comes before 16384."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in text.split()]
