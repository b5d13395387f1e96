"""Heat maps: a grid of shades with its figures in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specattn.report.svg import picture, tag, text, title

TOP, BOTTOM = 28.0, 40.0
NARROWEST, CHARACTER = 96.0, 6.8
"""Width of the rows' names: at least, and of a character."""

WIDEST, TALLEST, LOWEST = 900.0, 620.0, 16.0

Grid = Sequence[Sequence[float | None]]


def heatmap(
    values: Grid,
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    *,
    low: float | None = None,
    high: float | None = None,
    show: Callable[[float], str] | None = None,
    path: Sequence[int] = (),
) -> str:
    """An SVG of a grid.

    Args:
        values: ``[rows][columns]``; ``None`` is left blank.
        rows, columns: their names.
        labels: what the rows and the columns are.
        low, high: figures of the lightest and the darkest shade; those of the grid by default.
        show: how a figure is written into its cell; not at all by default.
        path: a column for each row, which gets a mark.
    """
    known = [value for row in values for value in row if value is not None]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0) if high is None else high
    left = max(NARROWEST, 16 + CHARACTER * max((len(name) for name in rows), default=0))
    wide = min(72.0 if show else 30.0, (WIDEST - left) / max(1, len(columns)))
    tall = max(LOWEST, min(30.0 if show else 22.0, TALLEST / max(1, len(rows))))
    cells = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                share = 0.0 if high == low else min(1.0, max(0.0, (value - low) / (high - low)))
                where = f"{labels[0]} {rows[i]}, {labels[1]} {columns[j]}: {value:.4g}"
                cells.append(
                    _cell((left + j * wide, TOP + i * tall), (wide, tall), share, where, show and show(value))
                )
    marks = [
        tag("circle", cx=left + (column + 0.5) * wide, cy=TOP + (i + 0.5) * tall, r=min(wide, tall) * 0.22)
        for i, column in enumerate(path)
    ]
    width, height = left + wide * len(columns) + 12, TOP + tall * len(rows) + BOTTOM
    names = _names(rows, columns, labels, (left, wide, tall))
    return picture(
        width,
        height,
        f"{labels[0]} by {labels[1]}",
        *cells,
        names,
        tag("g", *marks, class_="mark") if marks else "",
    )


def _cell(
    corner: tuple[float, float], size: tuple[float, float], share: float, where: str, shown: str | None
) -> str:
    """A shade between two of the page's colours; 1 % steps are finer than an eye sees."""
    style = f"--shade:{round(100 * share)}%"
    box = tag(
        "rect",
        title(where),
        x=corner[0] + 0.5,
        y=corner[1] + 0.5,
        width=size[0] - 1,
        height=size[1] - 1,
        class_="cell",
        style=style,
    )
    if shown is None:
        return box
    tone = "dark" if share > 0.55 else "light"
    return box + text(shown, corner[0] + size[0] / 2, corner[1] + size[1] / 2 + 4, "middle", f"on-{tone}")


def _names(
    rows: Sequence[str], columns: Sequence[str], labels: tuple[str, str], sizes: tuple[float, float, float]
) -> str:
    """Names of rows and columns, thinned out where there is no room for all."""
    left, wide, tall = sizes
    every_column = max(1, -(-_longest(columns) // max(1, int(wide))))
    bottom = TOP + tall * len(rows)
    shown = [text(name, left - 8, TOP + (i + 0.5) * tall + 4, "end") for i, name in enumerate(rows)]
    shown += [
        text(name, left + (j + 0.5) * wide, bottom + 16, "middle")
        for j, name in enumerate(columns)
        if j % every_column == 0
    ]
    shown += [
        text(labels[1], left + wide * len(columns) / 2, bottom + 32, "middle", "axis"),
        text(labels[0], left - 8, TOP - 10, "end", "axis"),
    ]
    return tag("g", *shown, class_="axes")


def _longest(names: Sequence[str]) -> int:
    return 8 * max((len(name) for name in names), default=1)
