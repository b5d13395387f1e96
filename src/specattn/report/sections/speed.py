"""Benchmarks: timings, and the ratios that sum them up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from specattn.report.content import Column, Figure, Key, Section, Table, Text
from specattn.report.lines import line_chart
from specattn.report.machines import machine

Benchmarks = Sequence[tuple[str, Mapping[str, Any]]]


def sections(benchmarks: Benchmarks) -> list[Section]:
    """A section for each run."""
    return [_section(name, document) for name, document in benchmarks]


def keys(benchmarks: Benchmarks) -> list[Key]:
    """Every ratio of every run."""
    return [
        Key(f"{value:.2f}", key, document.get("command") or name)
        for name, document in benchmarks
        for key, value in (document.get("ratios") or {}).items()
        if isinstance(value, int | float)
    ]


def _section(name: str, document: Mapping[str, Any]) -> Section:
    where = f"{document.get('command', name)}. {machine(document.get('environment') or {})}."
    gate = document["gate"]
    said = "" if gate == "passed" else f" Correctness gate: {gate}; no timings are reported."
    blocks: list[Text | Table | Figure] = [Text(where + said)]
    ratios = document.get("ratios") or {}
    if ratios:
        blocks.append(Table([Column("ratio"), Column("value", ".3g")], list(ratios.items())))
    rows = document["rows"]
    curves = speed_ups(rows)
    if curves:
        svg = line_chart(curves, "context, tokens", "speed-up over dense speculation", show_x=_tokens)
        blocks.append(Figure(svg, "Tokens a second of sparse over those of dense speculation."))
    for benchmark in dict.fromkeys(row.get("benchmark", "") for row in rows):
        blocks.append(_timings([row for row in rows if row.get("benchmark", "") == benchmark], benchmark))
    return Section(f"Speed: {name}", blocks)


def speed_ups(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """Context and speed-up of sparse over dense speculation, for each shape and batch that was timed in both modes."""
    speeds: dict[tuple[str, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.get("context") and row.get("tokens_per_second"):
            name = f"{row.get('shape', '')} batch {row.get('batch', 1)}".strip()
            speeds[name, row["context"]][str(row.get("mode"))] = row["tokens_per_second"]
    curves: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for (name, context), speed in speeds.items():
        if {"sparse", "dense"} <= speed.keys():
            ratio = speed["sparse"] / speed["dense"]
            curves[name].append((context, ratio, f"{name}, {context:,} tokens: {ratio:.2f} times as fast"))
    return dict(curves)


def _tokens(count: float) -> str:
    return f"{count:,.0f}"


def _timings(rows: Sequence[Mapping[str, Any]], benchmark: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "benchmark"))
    columns = [
        Column(name, ".4g" if any(isinstance(row.get(name), float) for row in rows) else "") for name in names
    ]
    return Table(columns, [[row.get(name) for name in names] for row in rows], note=benchmark)
