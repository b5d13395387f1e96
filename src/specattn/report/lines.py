"""Lines on two logarithmic axes, each with its name at its end: divergence against reads, speed against contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from specattn.report.scale import LogScale, log_scale, spread
from specattn.report.svg import Point, line, picture, polyline, tag, text, title

WIDTH, HEIGHT = 1010.0, 540.0
LEFT, TOP, BOTTOM = 64.0, 16.0, 48.0
PLOT_RIGHT, LABELS = 690.0, 714.0
COLOURS = 8
"""Colours of the page, ``c0`` to ``c7``; a line beyond them is dashed."""

Curves = Mapping[str, Sequence[tuple[float, float, str]]]
"""Points of each line: the two figures, and what the point is."""


def line_chart(
    curves: Curves,
    x_label: str,
    y_label: str,
    plain: frozenset[str] = frozenset(),
    show_x: Callable[[float], str] = "{:g}".format,
) -> str:
    """An SVG of the lines.

    Args:
        curves: points with positive figures.
        plain: lines drawn without a colour, as they are yardsticks and nothing to choose.
        show_x: how a figure is written below the horizontal axis.
    """
    points = [point for curve in curves.values() for point in curve]
    x = log_scale([point[0] for point in points], LEFT, PLOT_RIGHT)
    y = log_scale([point[1] for point in points], HEIGHT - BOTTOM, TOP)
    styles = _styles(curves, plain)
    ends = [max(curve) for curve in curves.values()]
    places = spread([y(end[1]) for end in ends], 17.0, TOP + 6, HEIGHT - BOTTOM)
    drawn = [
        _curve(name, sorted(curve), styles[name], x, y, place)
        for (name, curve), place in zip(curves.items(), places, strict=True)
    ]
    return picture(
        WIDTH, HEIGHT, f"{y_label} against {x_label}", _axes(x, y, x_label, y_label, show_x), *drawn
    )


def _styles(curves: Curves, plain: frozenset[str]) -> dict[str, str]:
    """A class for each line; those of one method, such as ``twilight base=quest``, are of one colour."""
    methods = list(dict.fromkeys(name.split()[0] for name in curves if name not in plain))
    seen: dict[str, int] = {}
    styles = {}
    for name in curves:
        if name in plain:
            styles[name] = "curve plain"
            continue
        number = methods.index(name.split()[0])
        seen[name.split()[0]] = variant = seen.get(name.split()[0], -1) + 1
        styles[name] = f"curve c{number % COLOURS} d{(number // COLOURS + variant) % 4}"
    return styles


def _curve(
    name: str, points: Sequence[tuple[float, float, str]], style: str, x: LogScale, y: LogScale, label: float
) -> str:
    """A line with its points, and its name beside it with a hair from the last point."""
    places: list[Point] = [(x(reads), y(divergence)) for reads, divergence, _ in points]
    dots = [
        tag("circle", title(note), cx=place[0], cy=place[1], r=3.5)
        for place, (_, _, note) in zip(places, points, strict=True)
    ]
    hair = polyline([places[-1], (PLOT_RIGHT + 6, label), (LABELS - 4, label)], "hair")
    return tag(
        "g",
        hair,
        polyline(places, "path"),
        *dots,
        text(name, LABELS, label + 4.0, class_="name"),
        class_=style,
    )


def _axes(x: LogScale, y: LogScale, x_label: str, y_label: str, show_x: Callable[[float], str]) -> str:
    low, high = HEIGHT - BOTTOM, TOP
    vertical = [
        line((x(tick), low), (x(tick), high), "grid") + text(show_x(tick), x(tick), low + 18, "middle")
        for tick in x.ticks()
    ]
    level = [
        line((LEFT, y(tick)), (PLOT_RIGHT, y(tick)), "grid") + text(f"{tick:g}", LEFT - 8, y(tick) + 4, "end")
        for tick in y.ticks()
    ]
    names = [
        text(x_label, (LEFT + PLOT_RIGHT) / 2, HEIGHT - 8, "middle", "axis"),
        tag(
            "g",
            text(y_label, 0, 0, "middle", "axis"),
            transform=f"translate(14 {(low + high) / 2:g}) rotate(-90)",
        ),
    ]
    return tag("g", *vertical, *level, *names, class_="axes")


def percent(share: float) -> str:
    """A share as a percentage without needless digits."""
    return f"{share:.3%}".rstrip("%").rstrip("0").rstrip(".") + " %"
