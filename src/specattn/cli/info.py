"""``specattn info``: what is installed, what is known by name, and what a pair looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.cli.models import Models, load_mapping
from specattn.cli.options import Debug, Draft, Dtype, Json, MappingFile, PairName, Target
from specattn.cli.output import console, print_json

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from specattn.pairs.source import Source
    from specattn.registry import Registry


def info(
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    mapping: MappingFile = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What is installed; the pairs and methods that are known; with a pair or a mapping, what it looks like.

    No weights are loaded.
    """
    from specattn.environment import environment
    from specattn.pairs import BUILTIN
    from specattn.prefill.registry import REGISTRY as PREFILLS
    from specattn.selection.registry import REGISTRY as METHODS

    report: dict[str, Any] = {
        "environment": environment(),
        "pairs": {name: asdict(models) for name, models in BUILTIN.items()},
        "methods": _defaults(METHODS),
        "prefills": _defaults(PREFILLS),
    }
    models = Models(pair, target, draft, None, dtype)
    if models.named:
        report |= _pair(models, mapping)
    elif mapping is not None:
        report["mapping"] = _mapping(mapping, [])
    _print(report, stderr=json)
    if json:
        print_json(report)


def _defaults(family: Registry[Any]) -> dict[str, dict[str, object]]:
    """Each member's options with their defaults."""
    return {name: family.get(name).options() for name in family.known}


def _pair(models: Models, mapping: Path | None) -> dict[str, Any]:
    """The models by their configurations, and the mapping, which must be theirs."""
    found = models.find()
    roles = zip(("target", "draft"), found.sources, strict=False)
    report: dict[str, Any] = {
        "pair": {"name": found.name} | {role: _model(source, found.dtype) for role, source in roles}
    }
    path = mapping or found.mapping_file
    return report if path is None else report | {"mapping": _mapping(path, found.sources)}


def _model(source: Source, dtype: torch.dtype | str) -> dict[str, Any]:
    import torch

    from specattn.geometry import KVGeometry

    config: Any = source.config
    stored = (config.dtype or torch.bfloat16) if isinstance(dtype, str) else dtype
    geometry = KVGeometry.from_config(config, stored)
    return {
        "name": source.name,
        "architecture": config.model_type,
        "parameters": source.parameters(),
        "context_limit": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "layers": geometry.layers,
        "query_heads": geometry.query_heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "dtype": str(stored).removeprefix("torch."),
        "kv_bytes_per_token": geometry.token_bytes,
    }


def _mapping(path: Path, sources: list[Source]) -> dict[str, Any]:
    """A mapping's metadata and layer map; with two models, after the check that it is theirs."""
    loaded = load_mapping(path)
    assert loaded is not None
    if len(sources) == 2:
        loaded.check(sources[0].config, sources[1].config)
    return {"file": path.name, **asdict(loaded.metadata), "layer_map": loaded.layer_map.tolist()}


def _print(report: dict[str, Any], *, stderr: bool) -> None:
    screen = console(stderr=stderr)
    pair = report.get("pair", {})
    sections = {
        "environment": report["environment"],
        "pairs": {name: f"{p['target']} + {p['draft']}" for name, p in report["pairs"].items()},
        "methods": {name: _options(options) for name, options in report["methods"].items()},
        "prefill methods": {name: _options(options) for name, options in report["prefills"].items()},
        **{role: pair[role] for role in ("target", "draft") if role in pair},
        **{role: report[role] for role in ("mapping",) if role in report},
    }
    for title, values in sections.items():
        screen.print(title, style="bold")
        screen.print(_table(values))


def _options(options: Mapping[str, object]) -> str:
    return " ".join(f"{name}={default}" for name, default in options.items())


def _table(values: Mapping[str, object]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, value in values.items():
        table.add_row(f"  {name}", _text(value))
    return table


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
