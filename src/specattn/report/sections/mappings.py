"""Mappings: how alike the layers of target and draft are, and which of the draft's layers are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specattn.report.content import Column, Figure, Section, Table, Text
from specattn.report.heatmap import heatmap

if TYPE_CHECKING:
    from torch import Tensor

    from specattn.mapping.artifact import Mapping

AXES = ("target layer", "draft layer")


def sections(mappings: Sequence[tuple[str, Mapping]]) -> list[Section]:
    """A section for each mapping."""
    return [_section(name, mapping) for name, mapping in mappings]


def _section(name: str, mapping: Mapping) -> Section:
    about = mapping.metadata
    said = (
        f"Target {_short(about.target)}, draft {_short(about.draft)}: {about.rounds:,} rounds of a text of "
        f"{about.tokens:,} tokens, layers compared by {about.metric}."
    )
    fit = Table(
        [Column("how the draft's heads are used"), Column("KL to the target's attention, nats", ".4f")],
        [
            ["one layer for each target layer", about.kl_layer_map],
            ["a mixture of all heads", about.kl_heads],
            [f"a mixture of {mapping.global_heads.numel()} heads", about.kl_global],
        ],
    )
    return Section(f"Mapping {name}", [Text(said), fit, _similarity(mapping), _weights(mapping)])


def _similarity(mapping: Mapping) -> Figure:
    scores = mapping.similarity.float().cpu()
    # A few dissimilar pairs of layers would take up most of the shades.
    floor = scores.flatten().quantile(0.05).item()
    path = mapping.layer_map.tolist()
    caption = "Similarity of the layers' attention; the dots are the layer map."
    table = Table(
        [Column("target layer", "d"), Column("draft layer", "d"), Column("similarity", ".4f")],
        [[layer, draft, scores[layer, draft].item()] for layer, draft in enumerate(path)],
    )
    svg = heatmap(scores.tolist(), *_names(scores), AXES, low=floor, path=path)
    return Figure(svg, caption, table)


def _weights(mapping: Mapping) -> Figure:
    geometry = mapping.metadata.geometry
    heads = mapping.heads_kv.float().cpu().unflatten(-1, (geometry.draft_layers, geometry.draft_heads))
    weights = heads.sum(-1).mean(1)
    caption = "Weight of each draft layer in the head mixtures, mean over KV heads."
    return Figure(heatmap(weights.tolist(), *_names(weights), AXES, low=0.0), caption)


def _names(grid: Tensor) -> tuple[list[str], list[str]]:
    rows, columns = grid.shape
    return [str(number) for number in range(rows)], [str(number) for number in range(columns)]


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
