"""Evaluation results as tables: which figures a protocol reports, and how people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from specattn.evaluation.fidelity import FidelityResult

Figures = Mapping[str, Any]
"""The figures of one row, by their names in the JSON document; ``interval`` is that of the view."""

Column = tuple[str, Callable[[Figures], str]]
"""A heading, and the cell below it."""


@dataclass(frozen=True)
class View:
    """What a protocol shows of a result.

    Attributes:
        title: of the table.
        figures: their names in the JSON document.
        columns: how people read them.
        interval: what the bootstrap interval is of.
    """

    title: str
    figures: tuple[str, ...]
    columns: tuple[Column, ...]
    interval: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a result in the JSON document."""
        return ("method", "options", "document", *self.figures, "prefill", "prefill_computed")


def _share(name: str) -> Callable[[Figures], str]:
    return lambda row: f"{row[name]:.1%}"


def _number(name: str, digits: int) -> Callable[[Figures], str]:
    return lambda row: f"{row[name]:.{digits}f}"


def _change(row: Figures) -> str:
    return f"{row['perplexity'] / row['perplexity_dense'] - 1:+.2%}"


def _interval(form: str) -> Callable[[Figures], str]:
    def cell(row: Figures) -> str:
        ends = row["interval"]
        return "" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"

    return cell


FIDELITY = View(
    title="fidelity to dense attention",
    figures=(
        "kl",
        "total_variation",
        "top1_agreement",
        "perplexity",
        "perplexity_dense",
        "attention_mass",
        "kv_read_fraction",
        "draft_read_fraction",
    ),
    columns=(
        ("KL", _number("kl", 4)),
        ("95 %", _interval(".4f")),
        ("TV", _number("total_variation", 4)),
        ("top-1", _share("top1_agreement")),
        ("ppl", _number("perplexity", 3)),
        ("dense", _number("perplexity_dense", 3)),
        ("mass", _share("attention_mass")),
        ("KV read", _share("kv_read_fraction")),
        ("draft", _share("draft_read_fraction")),
    ),
    interval="kl",
)

PERPLEXITY = View(
    title="perplexity",
    figures=("perplexity", "perplexity_dense", "kv_read_fraction", "draft_read_fraction"),
    columns=(
        ("perplexity", _number("perplexity", 3)),
        ("dense", _number("perplexity_dense", 3)),
        ("change", _change),
        ("95 %", _interval("+.2%")),
        ("KV read less", lambda row: f"{1 - row['kv_read_fraction']:.1%}"),
        ("draft read", _share("draft_read_fraction")),
    ),
    interval="change",
)


PREFILL = ("prefill", _share("prefill_computed"))
"""The column of evaluations whose prefill is not dense."""


def results_table(results: Sequence[FidelityResult], view: View, *, by_document: bool) -> Table:
    """A row for each method with its options: its mean over the documents, then each of them if wanted."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from specattn.evaluation.summary import intervals, label, means

    columns = view.columns + (PREFILL,) * any(result.prefill != "dense" for result in results)
    table = Table(title=view.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method, mean" if by_document else "method", overflow="fold")
    for heading, _ in columns:
        # In a narrow terminal names wrap, figures do not.
        table.add_column(heading, justify="right", no_wrap=True)
    ends = intervals(results)
    for name, figures in means(results).items():
        row = {**figures, "interval": ends[name][view.interval]}
        table.add_row(name, *_cells(columns, row), style="bold" if by_document else None)
        for result in results if by_document else ():
            if label(result) == name:
                own = intervals([result])[name][view.interval]
                table.add_row(f"  {result.document}", *_cells(columns, {**vars(result), "interval": own}))
    return table


def _cells(columns: Sequence[Column], figures: Figures) -> list[str]:
    return [cell(figures) for _, cell in columns]
