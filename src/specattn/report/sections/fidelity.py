"""Divergence against reads: the frontier, the table, and the documents one by one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from specattn.evaluation.summary import curve, label, means
from specattn.report.content import Column, Figure, Key, Section, Table, Text
from specattn.report.evaluations import Evaluation, is_yardstick, show_interval
from specattn.report.lines import line_chart, percent
from specattn.report.machines import machine
from specattn.report.sections import layers

GOAL = 0.01
"""The divergence, in nats a token, at which the summary compares methods."""

COLUMNS = {
    "KV read": ("kv_read_fraction", ".1%"),
    "draft read": ("draft_read_fraction", ".1%"),
    "KL": ("kl", ".4f"),
    "TV": ("total_variation", ".3f"),
    "top-1": ("top1_agreement", ".1%"),
    "mass": ("attention_mass", ".1%"),
    "perplexity": ("perplexity", ".3f"),
}
BEST = (
    "Marked rows are the frontier: no other method has both fewer reads and a lower KL. "
    "oracle and topk look at all keys for free and take no part, like dense."
)


def sections(evaluations: Sequence[Evaluation]) -> list[Section]:
    """A section for each protocol that measured divergence."""
    return [_section(evaluation) for evaluation in evaluations if evaluation.has_divergence]


def keys(evaluations: Sequence[Evaluation]) -> list[Key]:
    """For each protocol the least reads at :data:`GOAL`, or the least divergence if nothing reached it."""
    return [_key(evaluation) for evaluation in evaluations if evaluation.has_divergence]


def _section(evaluation: Evaluation) -> Section:
    figures = means(evaluation.results)
    blocks: list[Text | Table | Figure] = [Text(describe(evaluation))]
    curves = _curves(evaluation, figures)
    if curves:
        plain = frozenset(name for name in curves if is_yardstick(name))
        caption = "KL against the share of KV bytes read: left and low is better. Grey: yardsticks."
        svg = line_chart(
            curves, "KV bytes read by the target", "KL(dense ‖ sparse), nats a token", plain, percent
        )
        blocks.append(Figure(svg, caption))
    blocks.append(_table(evaluation, figures))
    if len(evaluation.documents) > 1:
        blocks.append(_by_document(evaluation))
    blocks += layers.figures(evaluation)
    return Section(f"Fidelity at {evaluation.protocol['context']:,} tokens", blocks)


def describe(evaluation: Evaluation) -> str:
    """The protocol in a sentence or two."""
    protocol, documents = evaluation.protocol, evaluation.documents
    texts = f"mean of {len(documents)} documents: {', '.join(documents)}" if documents[1:] else documents[0]
    return (
        f"{protocol['pair']}: the last {protocol['rows']:,} of {protocol['context']:,} tokens, decoded in rounds of "
        f"{protocol['gamma'] + 1}; {texts}. {machine(evaluation.environment)}."
        + ("" if evaluation.complete else " The run was interrupted: not every method has every document.")
    )


def frontier_of(figures: Mapping[str, Mapping[str, float]]) -> set[str]:
    """Labels that no other label beats in both reads and divergence; yardsticks take no part."""
    points = {
        name: (row["kv_read_fraction"], row["kl"]) for name, row in figures.items() if not is_yardstick(name)
    }
    return {
        name
        for name, (reads, divergence) in points.items()
        if not any(
            other != (reads, divergence) and other[0] <= reads and other[1] <= divergence
            for other in points.values()
        )
    }


def _curves(
    evaluation: Evaluation, figures: Mapping[str, Mapping[str, float]]
) -> dict[str, list[tuple[float, float, str]]]:
    """The lines to draw: dense attention lies where nothing is saved, and a logarithm has no zero."""
    lines: dict[str, dict[str, tuple[float, float, str]]] = defaultdict(dict)
    for result in evaluation.results:
        name = label(result)
        reads, divergence = figures[name]["kv_read_fraction"], figures[name]["kl"]
        if result.method != "dense" and reads > 0 and divergence > 0:
            lines[curve(result)][name] = (reads, divergence, f"{name}: KL {divergence:.4f} at {reads:.1%}")
    return {name: list(points.values()) for name, points in lines.items()}


def _table(evaluation: Evaluation, figures: Mapping[str, Mapping[str, float]]) -> Table:
    best = frontier_of(figures)
    rows = [
        [name, *(row[figure] for figure, _ in COLUMNS.values()), _change(row)]
        for name, row in figures.items()
    ]
    columns = [Column("method"), *(Column(title, form) for title, (_, form) in COLUMNS.items())]
    columns.append(Column("against dense", "+.2%"))
    place = 2 + list(COLUMNS).index("KL")
    columns.insert(place, Column("95 %"))
    for name, row in zip(figures, rows, strict=True):
        row.insert(place, show_interval(evaluation.intervals.get(name, {}).get("kl"), ".4f"))
    return Table(columns, rows, frozenset(n for n, name in enumerate(figures) if name in best), BEST)


def _change(row: Mapping[str, float]) -> float:
    return row["perplexity"] / row["perplexity_dense"] - 1


def _by_document(evaluation: Evaluation) -> Table:
    """KL of each document: whether a mean hides one of them."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for result in evaluation.results:
        found[label(result)][result.document] = result.kl
    columns = [Column("method"), *(Column(name, ".4f") for name in evaluation.documents)]
    rows = [[name, *(row.get(text) for text in evaluation.documents)] for name, row in found.items()]
    return Table(columns, rows, fold="KL of each document")


def _key(evaluation: Evaluation) -> Key:
    figures = means(evaluation.results)
    own = {
        name: row for name, row in figures.items() if not is_yardstick(name) and math.isfinite(row["kl"])
    } or figures
    where = f"{evaluation.protocol['context']:,} tokens, {len(evaluation.documents)} documents"
    good = {name: row["kv_read_fraction"] for name, row in own.items() if row["kl"] <= GOAL}
    if good:
        name = min(good, key=lambda name: good[name])
        return Key(f"{good[name]:.1%}", f"of the KV reads for a KL of at most {GOAL:g}", f"{name}; {where}")
    name = min(own, key=lambda name: own[name]["kl"])
    reads = own[name]["kv_read_fraction"]
    return Key(f"{own[name]['kl']:.4f}", f"the lowest KL, at {reads:.1%} of the KV reads", f"{name}; {where}")
