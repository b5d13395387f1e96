"""Results of many documents in one table and one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from math import exp, log
from pathlib import Path
from statistics import fmean

from specattn.errors import UsageError
from specattn.evaluation.fidelity import FidelityResult
from specattn.selection.registry import method_class

NAMES = ("method", "options", "document", "prefill")
FIGURES = [field.name for field in fields(FidelityResult) if field.name not in NAMES]


MAIN_OPTIONS = ("p", "budget")
"""Options that are swept to trace a frontier."""


def label(result: FidelityResult) -> str:
    """A method's name with its main option and those that differ from their defaults: ``specattn p=0.9 map=global``.

    The prefill follows where it is not dense.
    """
    defaults = method_class(result.method)().options()
    shown = {
        name: value
        for name, value in result.options.items()
        if name in MAIN_OPTIONS or value != defaults.get(name)
    }
    if result.prefill != "dense":
        shown["prefill"] = result.prefill
    return " ".join([result.method, *(f"{name}={value}" for name, value in shown.items())])


def curve(result: FidelityResult) -> str:
    """The frontier that a result belongs to: its label without the swept option."""
    swept = tuple(f"{name}=" for name in MAIN_OPTIONS)
    return " ".join(part for part in label(result).split() if not part.startswith(swept))


def means(results: Sequence[FidelityResult]) -> dict[str, dict[str, float]]:
    """Figures of each label, averaged over the documents; perplexities geometrically, as they multiply."""
    groups: dict[str, list[FidelityResult]] = defaultdict(list)
    for result in results:
        groups[label(result)].append(result)
    return {name: {f: _mean(f, group) for f in FIGURES} for name, group in groups.items()}


def _mean(figure: str, group: Sequence[FidelityResult]) -> float:
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

    figures_of = means(results)
    lines: dict[str, set[tuple[float, float]]] = defaultdict(set)
    for result in results:
        figures = figures_of[label(result)]
        lines[curve(result)].add((figures["kv_read_fraction"], figures["kl"]))
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
