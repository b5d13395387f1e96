"""Where methods spend their reads: density and attention mass by layer, of evaluations with ``--breakdown``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

from specattn.evaluation.summary import label
from specattn.report.content import Column, Figure, Table
from specattn.report.evaluations import Evaluation
from specattn.report.heatmap import heatmap

FIGURES = {
    "density": "Share of the tokens that are selected, by layer; mean over KV heads and documents.",
    "mass": "Share of the exact attention that they hold.",
}
Layers = Mapping[str, Mapping[int, float]]
"""A figure of each method and sparse layer."""


def figures(evaluation: Evaluation) -> list[Figure]:
    """A heat map of each figure, methods by layers; none without a breakdown."""
    found = {name: by_layer(evaluation, name) for name in FIGURES}
    return [_figure(FIGURES[name], layers) for name, layers in found.items() if layers]


def by_layer(evaluation: Evaluation, name: str) -> Layers:
    """``density`` or ``mass`` of each method and layer, mean over KV heads and documents."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result, row in zip(evaluation.results, evaluation.raw, strict=True):
        breakdown = row.get("breakdown") or {"layers": []}
        for layer, heads in zip(breakdown["layers"], breakdown.get(name, ()), strict=True):
            values[label(result)][layer].append(fmean(heads))
    return {
        method: {layer: fmean(shares) for layer, shares in layers.items()}
        for method, layers in values.items()
    }


def _figure(caption: str, methods: Layers) -> Figure:
    layers = sorted({layer for found in methods.values() for layer in found})
    names = [str(layer) for layer in layers]
    grid = [[found.get(layer) for layer in layers] for found in methods.values()]
    svg = heatmap(grid, list(methods), names, ("method", "layer"), low=0.0)
    columns = [Column("method"), *(Column(name, ".3f") for name in names)]
    rows = [[method, *line] for method, line in zip(methods, grid, strict=True)]
    return Figure(svg, caption, Table(columns, rows))
