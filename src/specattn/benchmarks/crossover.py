"""From which context on sparse speculation is the faster one: a figure and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

from specattn.errors import UsageError

Points = Sequence[tuple[int, float]]
"""Contexts, ascending, and the speed-up at each."""

Row = dict[str, Any]


def speed_ups(rows: Sequence[Row]) -> dict[tuple[str, int], Points]:
    """Tokens a second of sparse over those of dense speculation, for each shape and batch."""
    speeds: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["mode"] != "skipped":
            speeds[row["shape"], row["batch"], row["context"]][row["mode"]] = row["tokens_per_second"]
    points = defaultdict(list)
    for (shape, batch, context), speed in sorted(speeds.items()):
        points[shape, batch].append((context, speed["sparse"] / speed["dense"]))
    return dict(points)


def crossover(points: Points) -> float | None:
    """The context at which the speed-up comes to 1 for good, interpolated between its neighbours' logarithms.

    The smallest context if it never was below; ``None`` if it is below at the largest.
    """
    if points[-1][1] < 1:
        return None
    for (low, before), (high, after) in reversed(list(pairwise(points))):
        if before < 1:
            share = (1 - before) / (after - before)
            return exp(log(low) + share * (log(high) - log(low)))
    return float(points[0][0])


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """A row for each shape and batch; ``bound`` says that the crossover lies beyond what was measured."""
    return [
        {
            "shape": shape,
            "batch": batch,
            "crossover": crossover(points),
            "bound": _bound(points),
            "speed_up": {str(context): speed_up for context, speed_up in points},
        }
        for (shape, batch), points in speed_ups(rows).items()
    ]


def _bound(points: Points) -> str | None:
    if points[-1][1] < 1:
        return f"above {points[-1][0]}"
    return f"at most {points[0][0]}" if all(speed_up >= 1 for _, speed_up in points) else None


def plot_speed_up(rows: Sequence[Row], path: Path | str) -> None:
    """Speed-up over dense speculation against the context, a line for each shape and batch.

    Raises:
        UsageError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError('plots need matplotlib: pip install "specattn[plot]"') from None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lines = speed_ups(rows)
    shapes, batches = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True))
    for (shape, batch), points in lines.items():
        contexts, found = zip(*points, strict=True)
        axes.plot(
            contexts,
            found,
            color=f"C{batches.index(batch)}",
            marker="osD^v<>PX*"[shapes.index(shape) % 10],
            linestyle=("-", "--", ":", "-.")[shapes.index(shape) % 4],
            markersize=5,
            label=f"{shape}, batch {batch}",
        )
    axes.axhline(1, color="0.5", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="context, tokens", ylabel="speed-up over dense speculation")
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
