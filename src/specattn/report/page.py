"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib.resources import files

from specattn.report.content import Figure, Report, Table, Text


def page(report: Report) -> str:
    """The whole document: style and script are in it, and nothing is fetched."""
    from jinja2 import Environment, FunctionLoader

    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests |= {
        "table": lambda block: isinstance(block, Table),
        "figure": lambda block: isinstance(block, Figure),
        "paragraph": lambda block: isinstance(block, Text),
    }
    template = environment.get_template("page.html.jinja")
    return template.render(report=report, style=_asset("style.css"), script=_asset("sort.js"))


def _asset(name: str) -> str:
    return files("specattn.report").joinpath("assets", name).read_text(encoding="utf-8")
