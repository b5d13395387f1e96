"""A report as Markdown: its tables, and the numbers of its figures."""

from __future__ import annotations

from collections.abc import Iterator

from specattn.report.content import Column, Figure, Report, Section, Table, Text


def markdown(report: Report) -> str:
    """The whole document."""
    parts = [f"# {report.title}", *_keys(report)]
    for section in report.sections:
        parts += _section(section)
    columns = [Column("file"), Column("what"), Column("measured with")]
    parts += ["## Runs", _table(Table(columns, report.sources))]
    return "\n\n".join(parts) + "\n"


def _keys(report: Report) -> Iterator[str]:
    if report.keys:
        yield "\n".join(f"- **{key.value}** {key.what} ({key.where})" for key in report.keys)


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    for block in section.blocks:
        match block:
            case Text(text):
                yield text
            case Table():
                yield from _titled(block)
            case Figure():
                yield f"*{block.caption}*"
                if block.table is not None:
                    yield _table(block.table)


def _titled(table: Table) -> Iterator[str]:
    if table.fold:
        yield f"### {table.fold}"
    if table.note:
        yield table.note
    yield _table(table)


def _table(table: Table) -> str:
    """A table; marked rows are bold in their first cell."""
    head = [column.heading for column in table.columns]
    ruler = ["---:" if column.form else "---" for column in table.columns]
    lines = [head, ruler]
    for number, row in enumerate(table.rows):
        cells = [column.show(value) for column, value in zip(table.columns, row, strict=True)]
        if number in table.marked:
            cells[0] = f"**{cells[0]}**"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
