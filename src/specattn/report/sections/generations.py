"""Single generations: what they cost, and how many draft tokens their rounds accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from specattn.report.bars import bars
from specattn.report.content import Column, Figure, Key, Section, Table

COLUMNS = {
    "tokens": ("tokens", "d"),
    "rounds": ("rounds", "d"),
    "accepted": ("acceptance_rate", ".1%"),
    "tokens/s": ("tokens_per_second", ".1f"),
    "KV read": ("kv_read_fraction", ".1%"),
    "draft read": ("draft_read_fraction", ".1%"),
}
Generations = Sequence[tuple[str, Mapping[str, Any]]]


def sections(generations: Generations) -> list[Section]:
    """One section with a row and a histogram for each generation; none without generations."""
    if not generations:
        return []
    rows = [
        [name, document.get("method"), *(_figure(document, field) for field, _ in COLUMNS.values())]
        for name, document in generations
    ]
    columns = [Column("run"), Column("method"), *(Column(name, form) for name, (_, form) in COLUMNS.items())]
    drawn = [accepted(name, document["accepted_per_round"]) for name, document in generations]
    return [Section("Generation", [Table(columns, rows), *(figure for figure in drawn if figure)])]


def keys(generations: Generations) -> list[Key]:
    """The most tokens that a generation made in a round."""
    means = {
        name: 1 + sum(document["accepted_per_round"]) / len(document["accepted_per_round"])
        for name, document in generations
        if document["accepted_per_round"]
    }
    if not means:
        return []
    name = max(means, key=lambda name: means[name])
    return [Key(f"{means[name]:.2f}", "tokens a round", name)]


def accepted(name: str, lengths: Sequence[int]) -> Figure | None:
    """The histogram of accepted lengths; nothing if there was no round."""
    if not lengths:
        return None
    counts = Counter(lengths)
    return histogram(name, [counts[length] for length in range(max(lengths) + 1)])


def histogram(name: str, counts: Sequence[int]) -> Figure:
    """How many rounds accepted 0, 1, 2, ... draft tokens; there was at least one round."""
    rounds = sum(counts)
    shares = [count / rounds for count in counts]
    mean = sum(length * share for length, share in enumerate(shares))
    columns = [Column("accepted", "d"), Column("rounds", "d"), Column("share", ".1%")]
    rows = [[length, count, share] for length, (count, share) in enumerate(zip(counts, shares, strict=True))]
    svg = bars(shares, [str(length) for length in range(len(counts))], "draft tokens accepted in a round")
    return Figure(svg, f"{name}: {rounds:,} rounds, {mean:.2f} accepted on average", Table(columns, rows))


def _figure(document: Mapping[str, Any], field: str) -> Any:
    value = document.get(field)
    return len(value) if isinstance(value, list) else value
