"""Runs of tasks: scores beside reads, groups, what was left out, needle heat maps, accepted lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specattn.report.content import Column, Figure, Key, Section, Table, Text
from specattn.report.evaluations import show_interval
from specattn.report.heatmap import heatmap
from specattn.report.machines import machine
from specattn.report.sections.generations import histogram

if TYPE_CHECKING:
    from specattn.report.runs import TaskRun

COLUMNS = {
    "score": ("score", ".1%"),
    "samples": ("samples", "d"),
    "KV read": ("kv_read_fraction", ".1%"),
    "draft read": ("draft_read_fraction", ".1%"),
    "accepted": ("accepted_mean", ".2f"),
    "tokens/s": ("tokens_per_second", ".1f"),
}
DENSE = "dense"


def sections(runs: Sequence[TaskRun]) -> list[Section]:
    """A section for each run."""
    return [_section(run) for run in runs]


def keys(runs: Sequence[TaskRun]) -> list[Key]:
    """For each run with a score that of the method with the fewest reads, beside dense attention's if it was run."""
    return [key for run in runs if run.metric for key in _key(run)]


def _section(run: TaskRun) -> Section:
    blocks: list[Text | Table | Figure] = [Text(_describe(run)), _methods(run)]
    groups = _groups(run)
    blocks += [groups] if len(groups.rows) > 1 else []
    blocks += [figure for method in run.methods for figure in _heat_map(run, method)]
    blocks += [figure for method in run.methods for figure in _accepted(run, method)]
    return Section(f"Task {run.config['task']}", blocks)


def _describe(run: TaskRun) -> str:
    config = run.config
    options = _options({name: value for name, value in config["options"].items() if value not in ("", [])})
    where = "; ".join(machine(environment) for environment in run.environments)
    said = [f"{config['pair']}: {options}; {_options(config['engine'])}. {where}."]
    reasons = {reason: n for figures in run.methods.values() for reason, n in figures["left_out"].items()}
    if reasons:
        said.append(f"Left out: {'; '.join(f'{count}, {reason}' for reason, count in reasons.items())}.")
    unfinished = [method for method, figures in run.methods.items() if not figures["complete"]]
    if unfinished:
        said.append(f"Not all samples are answered yet: {', '.join(unfinished)}.")
    return " ".join(said)


def _options(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in values.items()
    )


def _methods(run: TaskRun) -> Table:
    shown = {name: column for name, column in COLUMNS.items() if run.metric or name != "score"}
    columns = [Column("method"), *(Column(name, form) for name, (_, form) in shown.items())]
    rows = [
        [method, *(figures.get(field) for field, _ in shown.values())]
        for method, figures in run.methods.items()
    ]
    if run.metric:
        columns.insert(2, Column("95 %"))
        for row, figures in zip(rows, run.methods.values(), strict=True):
            row.insert(2, show_interval(figures.get("interval"), ".1%"))
    return Table(columns, rows)


def _groups(run: TaskRun) -> Table:
    """Score of each group, or tokens a second where there is no score."""
    field, form = ("score", ".1%") if run.metric else ("tokens_per_second", ".1f")
    names = dict.fromkeys(name for figures in run.methods.values() for name in figures["groups"])
    rows = [
        [name, *(figures["groups"].get(name, {}).get(field) for figures in run.methods.values())]
        for name in names
    ]
    note = "" if run.metric else "Tokens a second."
    return Table([Column("group"), *(Column(method, form) for method in run.methods)], rows, note=note)


def _heat_map(run: TaskRun, method: str) -> list[Figure]:
    """Depth by length, where the samples have both."""
    from specattn.evaluation.tasks.heat_map import grid

    cells = grid(answer for answer in run.answers[method] if {"depth", "length"} <= answer.metadata.keys())
    if not cells:
        return []
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    svg = heatmap(
        [[cells.get((depth, length)) for length in lengths] for depth in depths],
        [f"{depth:.0%}" for depth in depths],
        [f"{length:,}" for length in lengths],
        ("depth", "tokens of context"),
        low=0.0,
        high=1.0,
        show="{:.0%}".format,
    )
    columns = [Column("depth", ".0%"), Column("length", ",d"), Column("score", ".1%")]
    table = Table(columns, [[depth, length, score] for (depth, length), score in cells.items()])
    return [Figure(svg, f"{method}: {run.metric} by depth and length", table)]


def _accepted(run: TaskRun, method: str) -> list[Figure]:
    counts = run.methods[method].get("accepted_per_round")
    return [histogram(method, counts)] if counts else []


def _key(run: TaskRun) -> list[Key]:
    scored = {name: figures for name, figures in run.methods.items() if figures["samples"]}
    own = {name: figures for name, figures in scored.items() if name.partition(":")[0] != DENSE}
    if not own:
        return []
    name = min(own, key=lambda name: own[name]["kv_read_fraction"])
    dense = f"; dense {scored[DENSE]['score']:.1%}" if DENSE in scored else ""
    where = f"{name} at {own[name]['kv_read_fraction']:.1%} of the KV reads{dense}; {own[name]['samples']} samples"
    return [Key(f"{own[name]['score']:.1%}", f"{run.metric} on {run.config['task']}", where)]
