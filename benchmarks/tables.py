"""Markdown tables and frontier plots of evaluation reports: ``tables.py REPORT.json [--plot frontier.png]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from specattn.evaluation.fidelity import FidelityResult
from specattn.evaluation.summary import means, plot_frontier

COLUMNS = {
    "KV read": ("kv_read_fraction", ".3f"),
    "KL": ("kl", ".4f"),
    "TV": ("total_variation", ".3f"),
    "top-1": ("top1_agreement", ".3f"),
    "mass kept": ("attention_mass", ".3f"),
}


def main() -> None:
    """Print the table of a report, a row a method, mean over the documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    unknown = {name: float("nan") for name, _ in COLUMNS.values()}  # reports of perplexity hold fewer figures
    results = [FidelityResult(**{**unknown, **row}) for row in report["results"]]
    shown = {title: column for title, column in COLUMNS.items() if column[0] in report["results"][0]}
    sys.stdout.write(f"| method | {' | '.join(shown)} | perplexity |\n|---|{'---|' * (len(shown) + 1)}\n")
    for name, figures in means(results).items():
        cells = [format(figures[figure], form) for figure, form in shown.values()]
        change = figures["perplexity"] / figures["perplexity_dense"] - 1
        cells.append(f"{figures['perplexity']:.3f} ({change:+.2%})")
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    if arguments.plot:
        plot_frontier(results, arguments.plot)


if __name__ == "__main__":
    main()
