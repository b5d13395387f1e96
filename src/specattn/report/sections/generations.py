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
    span = range(max(lengths) + 1)
    shares = [counts[length] / len(lengths) for length in span]
    mean = sum(lengths) / len(lengths)
    columns = [Column("accepted", "d"), Column("rounds", "d"), Column("share", ".1%")]
    table = Table(columns, [[length, counts[length], shares[length]] for length in span])
    svg = bars(shares, [str(length) for length in span], "draft tokens accepted in a round")
    return Figure(svg, f"{name}: {len(lengths):,} rounds, {mean:.2f} accepted on average", table)


def _figure(document: Mapping[str, Any], field: str) -> Any:
    value = document.get(field)
    return len(value) if isinstance(value, list) else value
