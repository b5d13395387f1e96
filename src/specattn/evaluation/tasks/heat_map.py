"""The scores of a needle run, depth by length, a picture a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from specattn.errors import UsageError
from specattn.evaluation.tasks.run_folder import Answer, RunFolder


def grid(answers: Iterable[Answer]) -> dict[tuple[float, int], float]:
    """The mean score of each depth and length, from the answers' metadata."""
    cells: dict[tuple[float, int], list[float]] = defaultdict(list)
    for answer in answers:
        if answer.error is None:
            depth, length = answer.metadata["depth"], answer.metadata["length"]
            cells[float(str(depth)), int(str(length))].append(answer.score)
    return {cell: fmean(scores) for cell, scores in sorted(cells.items())}


def plot_heat_map(folder: RunFolder, path: Path | str) -> None:
    """Draw the grids of all methods of a run, side by side.

    Raises:
        UsageError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError('plots need matplotlib: pip install "specattn[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    grids = {method: grid(folder.answers(method).values()) for method in folder.summary()["methods"]}
    figure, axes = pyplot.subplots(
        1, len(grids), figsize=(1.5 + 3.5 * len(grids), 3.6), squeeze=False, layout="constrained", sharey=True
    )
    for panel, (method, cells) in zip(axes[0], grids.items(), strict=True):
        depths = sorted({depth for depth, _ in cells})
        lengths = sorted({length for _, length in cells})
        # A cell whose samples were left out stays empty.
        scores = [[cells.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        image = panel.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(method, fontsize="medium")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xlabel("context, tokens")
        for row, values in enumerate(scores):
            for column, value in enumerate(values):
                if value == value:
                    panel.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize="small")
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=axes, label="found")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
