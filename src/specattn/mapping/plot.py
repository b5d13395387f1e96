"""A picture of a mapping: how alike the layers are, and which of the draft's layers the mixtures use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specattn.errors import UsageError

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping

_LABELS = {
    "kl": "-KL(target ‖ draft), nats",
    "js": "-Jensen-Shannon divergence, nats",
    "recall": "share of the target's nucleus in the draft's top tokens",
}


def plot_mapping(mapping: Mapping, path: str | Path) -> None:
    """Draw the layers' similarity with the layer map over it, and the head mixtures' weight per draft layer.

    Args:
        mapping: the mapping to draw.
        path: the file to write; its ending says the format, such as ``.png`` or ``.pdf``.

    Raises:
        UsageError: if matplotlib is missing, or the file cannot be written.
    """
    figure = _figure()
    similarity, weight = figure.subplots(1, 2, sharey=True)
    geometry = mapping.metadata.geometry
    scores = mapping.similarity.cpu()
    # A few dissimilar pairs of layers would take up most of the colours.
    floor = scores.flatten().float().quantile(0.05).item()
    label = _LABELS.get(mapping.metadata.metric, mapping.metadata.metric)
    _heatmap(similarity, scores, label, "viridis", vmin=floor, extend="min")
    _path(similarity, mapping.layer_map.tolist())
    similarity.set(title="Similarity and layer map", ylabel="target layer")
    heads = mapping.heads_kv.cpu().unflatten(-1, (geometry.draft_layers, geometry.draft_heads))
    _heatmap(weight, heads.sum(-1).mean(1), "weight, mean over KV heads", "magma_r", vmin=0.0)
    weight.set(title="Head mixture's weight per draft layer")
    figure.suptitle(f"Target {_short(mapping.metadata.target)}, draft {_short(mapping.metadata.draft)}")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot to {path}: {error}; choose another --plot") from error


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('a plot needs matplotlib: pip install "specattn[plot]"') from error
    # Without pyplot there is no display and no global state; saving uses Agg.
    return Figure(figsize=(12, 6), layout="constrained")


def _heatmap(axes: Any, values: Tensor, label: str, cmap: str, vmin: float, extend: str = "neither") -> None:
    image = axes.imshow(values.numpy(), cmap=cmap, vmin=vmin, aspect="auto", interpolation="nearest")
    axes.set_xlabel("draft layer")
    axes.locator_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label=label, extend=extend)


def _path(axes: Any, layer_map: list[int]) -> None:
    layers = range(len(layer_map))
    # A dark line below the light one is visible on every colour.
    axes.plot(layer_map, layers, color="black", linewidth=3.5)
    marks = {"marker": "o", "markersize": 5, "markeredgecolor": "black"}
    axes.plot(layer_map, layers, color="white", linewidth=1.5, label="layer map", **marks)
    axes.legend(loc="upper right", facecolor="0.25", labelcolor="white")


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
