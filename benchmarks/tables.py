"""Markdown tables and frontier plots of evaluation reports: ``tables.py REPORT.json [--plot frontier.png]``.

``--at 0.2`` asks for the KL of each document at equal reads instead: of each frontier, interpolated between its points
on a logarithmic scale. Frontiers that do not reach so far are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import fmean

from specattn.evaluation.fidelity import FidelityResult
from specattn.evaluation.summary import curve, intervals, means, plot_frontier

COLUMNS = {
    "KV read": ("kv_read_fraction", ".3f"),
    "KL": ("kl", ".4f"),
    "TV": ("total_variation", ".3f"),
    "top-1": ("top1_agreement", ".3f"),
    "mass kept": ("attention_mass", ".3f"),
}

Points = Sequence[tuple[float, float]]


def table(results: Sequence[FidelityResult], known: set[str]) -> Iterator[str]:
    """A row a method, mean over the documents, with the 95 % interval of the change in perplexity."""
    shown = {title: column for title, column in COLUMNS.items() if column[0] in known}
    yield f"| method | {' | '.join(shown)} | perplexity | change, 95 % |"
    yield f"|---|{'---|' * (len(shown) + 2)}"
    ends = intervals(results)
    for name, figures in means(results).items():
        cells = [format(figures[figure], form) for figure, form in shown.values()]
        change = figures["perplexity"] / figures["perplexity_dense"] - 1
        cells.append(f"{figures['perplexity']:.3f} ({change:+.2%})")
        low_high = ends[name]["change"]
        cells.append("" if low_high is None else "{:+.1%} to {:+.1%}".format(*low_high))
        yield f"| {name} | {' | '.join(cells)} |"


def at_equal_reads(results: Sequence[FidelityResult], read: float) -> Iterator[str]:
    """A row a frontier: the KL of each document where it reads this share, and their mean."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        points[curve(result)][result.document].append((result.kv_read_fraction, result.kl))
    documents = list(dict.fromkeys(result.document for result in results))
    yield f"| KL at {read:.0%} of the reads | {' | '.join(documents)} | mean |"
    yield f"|---|{'---|' * (len(documents) + 1)}"
    for name, of_document in points.items():
        found = [interpolated(of_document[document], read) for document in documents]
        values = [value for value in found if value is not None]
        if len(values) == len(documents):
            cells = " | ".join(format(value, ".4f") for value in (*values, fmean(values)))
            yield f"| {name} | {cells} |"


def interpolated(points: Points, read: float) -> float | None:
    """KL where a frontier reads this share; ``None`` outside of its points."""
    for (below, first), (above, second) in pairwise(sorted(set(points))):
        if below <= read <= above:
            part = (read - below) / (above - below)
            return exp(log(first) * (1 - part) + log(second) * part)
    return None


def main() -> None:
    """Print the tables of one or several reports of the same documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--at", type=float, nargs="+", help="shares of the KV bytes")
    asked = parser.parse_args()
    rows = [row for path in asked.reports for row in json.loads(path.read_text())["results"]]
    unknown = {name: float("nan") for name, _ in COLUMNS.values()}  # reports of perplexity hold fewer figures
    results = [FidelityResult(**{**unknown, **row}) for row in rows]
    tables = [at_equal_reads(results, read) for read in asked.at or ()] or [table(results, set(rows[0]))]
    sys.stdout.write("\n\n".join("\n".join(lines) for lines in tables) + "\n")
    if asked.plot:
        plot_frontier(results, asked.plot)


if __name__ == "__main__":
    main()
