"""Results of many documents in one table and one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.fidelity import FidelityResult

FIGURES = [field.name for field in fields(FidelityResult) if field.name not in ("method", "options", "document")]


def label(result: FidelityResult, distinguishing: Sequence[str]) -> str:
    """A method's name with the options that tell it from its neighbours: ``specattn p=0.9``."""
    options = [f"{name}={result.options[name]}" for name in distinguishing if name in result.options]
    return " ".join([result.method, *options])


def distinguishing_options(results: Sequence[FidelityResult]) -> dict[str, list[str]]:
    """For each method, the options whose values differ between its results, and its main one."""
    values: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))
    for result in results:
        for name, value in result.options.items():
            values[result.method][name].add(value)
    main = ("p", "budget")
    return {
        method: [name for name, seen in options.items() if len(seen) > 1 or name in main]
        for method, options in values.items()
    }


def means(results: Sequence[FidelityResult]) -> dict[str, dict[str, float]]:
    """Figures of each method and options, averaged over the documents; perplexities geometrically, as they multiply."""
    options = distinguishing_options(results)
    groups: dict[str, list[FidelityResult]] = defaultdict(list)
    for result in results:
        groups[label(result, options[result.method])].append(result)
    return {name: {f: _mean(f, group) for f in FIGURES} for name, group in groups.items()}


def _mean(figure: str, group: Sequence[FidelityResult]) -> float:
    from math import exp, log

    values = [getattr(result, figure) for result in group]
    return exp(fmean(log(value) for value in values)) if figure.startswith("perplexity") else fmean(values)


def plot_frontier(results: Sequence[FidelityResult], path: Path | str) -> None:
    """KL against the share of KV bytes read, a line a method, mean over the documents.

    Raises:
        UsageError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError('plots need matplotlib: pip install "specattn[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, figures in means(results).items():
        # Options other than the swept one begin a line of their own.
        swept = [part for part in name.split() if not part.startswith(("p=", "budget="))]
        lines[" ".join(swept)].append((figures["kv_read_fraction"], figures["kl"]))
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for name, points in lines.items():
        reads, divergence = zip(*sorted(points), strict=True)
        axes.plot(reads, divergence, marker="o", label=name)
    axes.set(yscale="log", xlabel="KV bytes read by the target", ylabel="KL(dense || sparse), nats a token")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
