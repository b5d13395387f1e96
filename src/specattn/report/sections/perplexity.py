"""Perplexity in the paper's protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from specattn.evaluation.summary import label, means
from specattn.report.content import Column, Key, Section, Table, Text
from specattn.report.evaluations import Evaluation, is_yardstick, show_interval
from specattn.report.sections.fidelity import describe
from specattn.report.sections.layers import figures

GOAL = 0.005
"""The rise of perplexity at which the summary compares methods."""


def sections(evaluations: Sequence[Evaluation]) -> list[Section]:
    """A section for each protocol that measured perplexity alone."""
    return [_section(evaluation) for evaluation in evaluations if not evaluation.has_divergence]


def keys(evaluations: Sequence[Evaluation]) -> list[Key]:
    """For each protocol the most reads saved at :data:`GOAL`, if anything reached it."""
    return [key for evaluation in evaluations if not evaluation.has_divergence for key in _key(evaluation)]


def _section(evaluation: Evaluation) -> Section:
    measured = Counter(label(result) for result in evaluation.results)
    rows = [
        [
            name,
            measured[name],
            row["perplexity"],
            row["perplexity_dense"],
            row["perplexity"] / row["perplexity_dense"] - 1,
            show_interval(evaluation.intervals.get(name, {}).get("change"), "+.2%"),
            1 - row["kv_read_fraction"],
            row["draft_read_fraction"],
        ]
        for name, row in means(evaluation.results).items()
    ]
    columns = [
        Column("method"),
        Column("documents", "d"),
        Column("perplexity", ".3f"),
        Column("dense", ".3f"),
        Column("change", "+.2%"),
        Column("95 %"),
        Column("KV read less", ".1%"),
        Column("draft read", ".1%"),
    ]
    title = f"Perplexity at {evaluation.protocol['context']:,} tokens"
    return Section(title, [Text(describe(evaluation)), Table(columns, rows), *figures(evaluation)])


def _key(evaluation: Evaluation) -> list[Key]:
    saved = {
        name: 1 - row["kv_read_fraction"]
        for name, row in means(evaluation.results).items()
        if row["perplexity"] <= row["perplexity_dense"] * (1 + GOAL) and not is_yardstick(name)
    }
    if not saved:
        return []
    name = max(saved, key=lambda name: saved[name])
    where = f"{name}; {evaluation.protocol['context']:,} tokens, {len(evaluation.documents)} documents"
    return [Key(f"{saved[name]:.1%}", f"fewer KV reads for at most {GOAL:+.1%} perplexity", where)]
