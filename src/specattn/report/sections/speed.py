"""Benchmarks: timings, and the ratios that sum them up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specattn.report.content import Column, Figure, Key, Section, Table, Text
from specattn.report.lines import line_chart
from specattn.report.machines import machine

MOST = 6
"""Ratios of a run that the summary shows."""

Benchmarks = Sequence[tuple[str, Mapping[str, Any]]]


def sections(benchmarks: Benchmarks) -> list[Section]:
    """A section for each run."""
    return [_section(name, document) for name, document in benchmarks]


def keys(benchmarks: Benchmarks) -> list[Key]:
    """The ratios of every run that has few of them; those of others are in their sections."""
    return [
        Key(f"{value:.2f}", key, document.get("command") or name)
        for name, document in benchmarks
        for key, value in (document.get("ratios") or {}).items()
        if len(document["ratios"]) <= MOST
    ]


def _section(name: str, document: Mapping[str, Any]) -> Section:
    where = f"{document.get('command', name)}. {machine(document.get('environment') or {})}."
    gate = document["gate"]
    said = "" if gate == "passed" else f" Correctness gate: {gate}; no timings are reported."
    blocks: list[Text | Table | Figure] = [Text(where + said)]
    ratios = document.get("ratios") or {}
    if ratios:
        blocks.append(Table([Column("ratio"), Column("value", ".3g")], list(ratios.items())))
    blocks += _crossovers(document.get("crossover") or ())
    rows = document["rows"]
    for benchmark in dict.fromkeys(row.get("benchmark", "") for row in rows):
        blocks.append(_timings([row for row in rows if row.get("benchmark", "") == benchmark], benchmark))
    return Section(f"Speed: {name}", blocks)


def _crossovers(found: Sequence[Mapping[str, Any]]) -> Iterator[Figure | Table]:
    """Speed-up of sparse over dense speculation against the context, and from where on it is one."""
    if not found:
        return
    names = [f"{row['shape']} batch {row['batch']}" for row in found]
    curves = {
        name: [
            (float(context), speed_up, f"{name}, {int(context):,} tokens: {speed_up:.2f} times as fast")
            for context, speed_up in row["speed_up"].items()
        ]
        for name, row in zip(names, found, strict=True)
    }
    svg = line_chart(curves, "context, tokens", "speed-up over dense speculation", show_x=_tokens)
    yield Figure(svg, "Tokens a second of sparse over those of dense speculation.")
    rows = [
        [name, row["bound"] or row["crossover"], max(row["speed_up"].values())]
        for name, row in zip(names, found, strict=True)
    ]
    yield Table([Column("shape"), Column("as fast from", ",.0f"), Column("largest speed-up", ".2f")], rows)


def _tokens(count: float) -> str:
    return f"{count:,.0f}"


def _timings(rows: Sequence[Mapping[str, Any]], benchmark: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "benchmark"))
    columns = [
        Column(name, ".4g" if any(isinstance(row.get(name), float) for row in rows) else "") for name in names
    ]
    return Table(columns, [[row.get(name) for name in names] for row in rows], note=benchmark)
