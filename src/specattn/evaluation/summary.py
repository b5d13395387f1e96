"""Results of many documents in one table and one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from math import exp, expm1, log
from pathlib import Path
from statistics import fmean

from specattn.errors import UsageError
from specattn.evaluation.bootstrap import interval
from specattn.evaluation.fidelity import FidelityResult
from specattn.selection.registry import SWEPT, short_name

NAMES = ("method", "options", "document", "prefill", "detail")
FIGURES = [field.name for field in fields(FidelityResult) if field.name not in NAMES]


def label(result: FidelityResult) -> str:
    """A method's name with its main options and those that differ from their defaults: ``specattn p=0.9 map=global``.

    The prefill follows where it is not dense.
    """
    name = short_name(result.method, result.options)
    return name if result.prefill == "dense" else f"{name} prefill={result.prefill}"


def curve(result: FidelityResult) -> str:
    """The frontier that a result belongs to: its label without the swept options, its own and those of its base."""
    swept = tuple(f"{name}=" for name in SWEPT)
    parts = [part for part in label(result).split() if not part.startswith(swept)]
    return " ".join(part.partition(":")[0] if part.startswith("base=") else part for part in parts)


def means(results: Sequence[FidelityResult]) -> dict[str, dict[str, float]]:
    """Figures of each label, averaged over the documents; perplexities geometrically, as they multiply."""
    groups: dict[str, list[FidelityResult]] = defaultdict(list)
    for result in results:
        groups[label(result)].append(result)
    return {name: {f: _mean(f, group) for f in FIGURES} for name, group in groups.items()}


def intervals(results: Sequence[FidelityResult]) -> dict[str, dict[str, tuple[float, float] | None]]:
    """The 95 % bootstrap intervals of each label: of ``kl``, and of ``change``, perplexity against the dense model's.

    Over the documents where there are several, so that they speak of documents of this kind; over the rounds of a
    single one, so that they speak of that document.
    """
    groups: dict[str, list[FidelityResult]] = defaultdict(list)
    for result in results:
        groups[label(result)].append(result)
    return {name: _intervals(group) for name, group in groups.items()}


def _intervals(group: Sequence[FidelityResult]) -> dict[str, tuple[float, float] | None]:
    kl: Sequence[float] = [result.kl for result in group]
    change: Sequence[float] = [log(result.perplexity / result.perplexity_dense) for result in group]
    if len(group) == 1 and group[0].detail is not None:
        kl, change = group[0].detail.kl, group[0].detail.nll_change
    logs = interval([change])
    return {"kl": interval([kl]), "change": logs and (expm1(logs[0]), expm1(logs[1]))}


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
    # Dense attention lies where nothing is saved, far from what is to be compared.
    lines = {name: points for name, points in lines.items() if min(points)[0] < 1} or lines
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours, markers = pyplot.get_cmap("tab10").colors, "osD^v<>PX*"  # type: ignore[attr-defined]
    for number, (name, points) in enumerate(lines.items()):
        reads, divergence = zip(*sorted(points), strict=True)
        colour, marker = (
            colours[number % len(colours)],
            markers[(number // len(colours) + number) % len(markers)],
        )
        axes.plot(reads, divergence, color=colour, marker=marker, markersize=5, label=name)
    axes.set(yscale="log", xlabel="KV bytes read by the target", ylabel="KL(dense || sparse), nats a token")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(True, which="both", alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
