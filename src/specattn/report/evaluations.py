"""Reports of ``specattn eval fidelity`` and ``perplexity``: one protocol, many results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.fidelity import FidelityResult
from specattn.evaluation.summary import intervals, label

PROTOCOL = ("pair", "context", "rows", "gamma")
FREE = ("oracle", "topk")
"""Methods that look at all keys and are not charged for it: yardsticks, like dense attention."""


@dataclass(frozen=True)
class Evaluation:
    """What one protocol measured.

    Attributes:
        protocol: pair, context, rows and gamma.
        documents: names of the texts.
        results: one for each method and document; figures that were not reported are NaN.
        raw: the same as they stand in the file.
        intervals: 95 % intervals of ``kl`` and ``change`` by label, as far as they are known.
        complete: whether nothing was interrupted.
        environment: what it was measured with.
    """

    protocol: Mapping[str, Any]
    documents: Sequence[str]
    results: Sequence[FidelityResult]
    raw: Sequence[Mapping[str, Any]]
    intervals: Mapping[str, Mapping[str, Any]]
    complete: bool
    environment: Mapping[str, Any]

    @property
    def has_divergence(self) -> bool:
        """Whether it compares distributions, not perplexities alone."""
        return any(math.isfinite(result.kl) for result in self.results)

    @property
    def key(self) -> tuple[object, ...]:
        """Evaluations with the same key can stand in one table."""
        return (*self.protocol.values(), *self.documents, self.has_divergence)


def parse_evaluation(document: Mapping[str, Any], name: str) -> Evaluation:
    """The evaluation of a JSON document.

    Raises:
        UsageError: if the document or one of its results lacks a field, or names a method that does not exist.
    """
    missing = [field for field in PROTOCOL if field not in document]
    if missing:
        raise UsageError(
            f"{name} has results but no {missing[0]!r}: give a report of `specattn eval ... --json`"
        )
    rows = document["results"]
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{name} holds no results; leave it out, or evaluate again")
    results = [_result(row, f"{name}, result {number}") for number, row in enumerate(rows, 1)]
    return Evaluation(
        {field: document[field] for field in PROTOCOL},
        tuple(dict.fromkeys(result.document for result in results)),
        results,
        rows,
        document.get("intervals") or intervals(results),
        bool(document.get("complete", True)),
        document.get("environment") or {},
    )


def _result(row: Any, where: str) -> FidelityResult:
    """A row as a result; fields that this version does not know are left out."""
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not an object; the file is damaged")
    missing = [name for name in ("method", "options", "document") if name not in row]
    if missing:
        raise UsageError(f"{where} has no {missing[0]!r}; the file is damaged")
    known = dataclasses.fields(FidelityResult)
    unmeasured = {field.name: math.nan for field in known if field.default is dataclasses.MISSING}
    given = {field.name: row[field.name] for field in known if row.get(field.name) is not None}
    result = FidelityResult(**{**unmeasured, **given})
    label(result)  # refuses a method that does not exist
    return result


def join(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations with one key become one; a method that several of them measured counts once, the first time."""
    groups: dict[tuple[object, ...], list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.key, []).append(evaluation)
    return [_merge(group) for group in groups.values()]


def _merge(group: Sequence[Evaluation]) -> Evaluation:
    pairs = [pair for part in group for pair in zip(part.results, part.raw, strict=True)]
    first: dict[tuple[str, str], tuple[FidelityResult, Mapping[str, Any]]] = {}
    for result, row in pairs:
        first.setdefault((label(result), result.document), (result, row))
    return dataclasses.replace(
        group[0],
        results=[result for result, _ in first.values()],
        raw=[row for _, row in first.values()],
        intervals={name: ends for part in reversed(group) for name, ends in part.intervals.items()},
        complete=all(part.complete for part in group),
    )


def show_interval(ends: Sequence[float] | None, form: str) -> str | None:
    """Both ends of an interval; nothing if it is not known."""
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else None


def is_yardstick(name: str) -> bool:
    """Whether a label is of dense attention, or of a method that looks at all keys for free."""
    method, *options = name.split()
    bases = [
        option.removeprefix("base=").partition(":")[0] for option in options if option.startswith("base=")
    ]
    return method == "dense" or any(part in FREE for part in [method, *bases])
