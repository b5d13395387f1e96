"""Markdown tables and frontier plots of evaluation reports: ``tables.py REPORT.json [--plot frontier.png]``.

``--at 0.2`` asks for the KL of each document at equal reads instead: of each frontier, interpolated between its points
on a logarithmic scale. Frontiers that do not reach so far are left out.

Documents of tasks and of ``examples/lossless_reads.py`` have tables of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

from specattn.evaluation.fidelity import FidelityResult
from specattn.evaluation.summary import curve, intervals, means, plot_frontier
from specattn.selection.registry import parse_method, short_name

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


def tasks(document: dict[str, Any]) -> Iterator[str]:
    """A row a method: its score, and what it has more than dense decoding on the same samples.

    A score of some of the samples only is left out: they may be the easier ones.
    """
    yield f"| {document['task']} | samples | {document['metric']}, 95 % | - dense, 95 % | KV read | accepted |"
    yield "|---|---|---|---|---|---|"
    for method, figures in document["methods"].items():
        score = spread(figures["score"], figures["interval"], "") if figures["complete"] else "incomplete"
        against = figures.get("against_dense")
        difference = spread(against["difference"], against["interval"], "+") if against else ""
        read, accepted = figures["kv_read_fraction"], figures["accepted_mean"]
        cells = f"{figures['samples']} | {score} | {difference} | {read:.3f} | {accepted:.2f}"
        yield f"| {shown_as(method)} | {cells} |"


def spread(value: float, interval: Sequence[float] | None, sign: str) -> str:
    """A figure with its interval: ``0.495 (0.425 to 0.565)``."""
    ends = "" if interval is None else " ({:{sign}.3f} to {:{sign}.3f})".format(*interval, sign=sign)
    return f"{value:{sign}.3f}{ends}"


def task_groups(document: dict[str, Any]) -> Iterator[str]:
    """A row a group, a column a method that answered everything: the score, and at which share of the reads."""
    methods = {name: row for name, row in document["methods"].items() if row["complete"]}
    yield f"| {document['metric']} at reads | {' | '.join(map(shown_as, methods))} |"
    yield f"|---|{'---|' * len(methods)}"
    groups = {group for figures in methods.values() for group in figures["groups"]}
    for group in sorted(groups, key=lambda name: (int(name) if name.isdigit() else 0, name)):
        found = [figures["groups"][group] for figures in methods.values()]
        cells = " | ".join(f"{row['score']:.2f} at {row['kv_read_fraction']:.3f}" for row in found)
        yield f"| {group} | {cells} |"


def shown_as(method: str) -> str:
    """A method's text with the options that a reader wants: ``quest`` becomes ``quest budget=0.1``."""
    parsed = parse_method(method)
    return short_name(parsed.name, parsed.options())


def lossless(document: dict[str, Any]) -> Iterator[str]:
    """A row a method: reads of the target, and how far its tokens are from dense speculation's and the dense choice.

    "Part with a gap" is how far the logit of the first other token lies below the largest; 0 is a tie, or the largest
    itself.
    """
    columns = ("dense reads a token", "all reads a token", "stood", "same answers", "part with a gap")
    yield f"| method | {' | '.join(columns)} | tokens below the largest logit |"
    yield f"|---|{'---|' * (len(columns) + 1)}"
    for row in document["results"]:
        prompts = row["prompts"]
        gaps = Counter(prompt["gap_there"] for prompt in prompts if not prompt["equal"])
        cells = [
            f"{row['dense_reads_per_token']:.3f}",
            f"{row['kv_reads_per_token']:.3f}",
            f"{row['acceptance_rate']:.2f}" if "acceptance_rate" in row else "",
            f"{sum(prompt['equal'] for prompt in prompts)} of {len(prompts)}",
            ", ".join(f"{gap:g} in {count}" for gap, count in sorted(gaps.items())),
            f"{sum(prompt['tokens_below'] for prompt in prompts)} of"
            f" {sum(prompt['tokens'] for prompt in prompts):,}, by {row['largest_gap']:g} at most",
        ]
        yield f"| {shown_as(row['method'])} | {' | '.join(cells)} |"


def main() -> None:
    """Print the tables of one or several reports of the same documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--at", type=float, nargs="+", help="shares of the KV bytes")
    asked = parser.parse_args()
    documents = [json.loads(path.read_text()) for path in asked.reports]
    own = [table for document in documents for table in own_tables(document)]
    if own:
        write(own)
        return
    rows = [row for document in documents for row in document["results"]]
    unknown = {name: float("nan") for name, _ in COLUMNS.values()}  # reports of perplexity hold fewer figures
    results = [FidelityResult(**{**unknown, **row}) for row in rows]
    tables = [at_equal_reads(results, read) for read in asked.at or ()] or [table(results, set(rows[0]))]
    write(tables)
    if asked.plot:
        plot_frontier(results, asked.plot)


def own_tables(document: dict[str, Any]) -> list[Iterator[str]]:
    """The tables of a document that is no evaluation of texts."""
    if document.get("command") == "lossless_reads":
        return [lossless(document)]
    if "task" in document:
        grouped = any(figures["groups"] for figures in document["methods"].values())
        return [tasks(document), *([task_groups(document)] if grouped else [])]
    return []


def write(tables: Sequence[Iterator[str]]) -> None:
    sys.stdout.write("\n\n".join("\n".join(lines) for lines in tables) + "\n")


if __name__ == "__main__":
    main()
