"""SVG elements as text. Colours are the page's own, so that light and dark are its business."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Point = tuple[float, float]


def tag(name: str, *inside: str, **attributes: object) -> str:
    """An element. ``class_`` stands for ``class``, and other underscores for hyphens."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(inside)}</{name}>" if inside else f"<{name}{given}/>"


def text(content: str, x: float, y: float, anchor: str = "start", class_: str | None = None) -> str:
    """A line of text."""
    return tag("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)


def title(content: str) -> str:
    """What a pointer that rests on the element sees, and what a screen reader says."""
    return f"<title>{escape(content)}</title>"


def line(start: Point, end: Point, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def polyline(points: Sequence[Point], class_: str) -> str:
    """Points joined in their order."""
    joined = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
    return tag("polyline", points=joined, class_=class_)


def picture(width: float, height: float, label: str, *inside: str) -> str:
    """The ``<svg>`` element; it shrinks with the page."""
    return tag(
        "svg",
        *inside,
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        role="img",
        aria_label=label,
        style=f"--width:{_number(width)}px",
    )


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
