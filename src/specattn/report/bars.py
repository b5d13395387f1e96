"""Bars: how often each accepted length came, or how much each layer reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specattn.report.svg import line, picture, tag, text, title

LEFT, TOP, BOTTOM, HEIGHT = 12.0, 22.0, 46.0, 220.0


def bars(
    values: Sequence[float], names: Sequence[str], label: str, show: Callable[[float], str] = "{:.0%}".format
) -> str:
    """An SVG of one bar for each value; all are at least 0.

    Args:
        names: what stands below the bars.
        label: what the names are.
        show: how a figure is written above its bar.
    """
    wide = max(14.0, min(64.0, 840.0 / max(1, len(values))))
    floor, most = HEIGHT - BOTTOM, max([*values, 0.0]) or 1.0
    width = LEFT + wide * len(values) + 16
    every = max(1, round(34 / wide))
    drawn = []
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        left, tall = LEFT + number * wide, (floor - TOP) * value / most
        middle = left + wide / 2
        drawn.append(
            tag("rect", title(f"{label} {name}: {show(value)}"), x=left + wide * 0.12, y=floor - tall, rx=2.0,
                width=wide * 0.76, height=tall, class_="bar")
        )  # fmt: skip
        if number % every == 0:
            drawn.append(text(name, middle, floor + 18, "middle"))
            drawn.append(text(show(value), middle, floor - tall - 6, "middle", "value"))
    ground = line((LEFT, floor), (width - 16, floor), "ground")
    axis = text(label, (LEFT + width - 16) / 2, HEIGHT - 8, "middle", "axis")
    return picture(width, HEIGHT, label, tag("g", *drawn, ground, axis, class_="axes"))
