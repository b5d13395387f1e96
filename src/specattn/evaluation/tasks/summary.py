"""The figures of a run, from its answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from specattn.evaluation.bootstrap import interval
from specattn.evaluation.tasks.base import LeftOut
from specattn.evaluation.tasks.paired import paired
from specattn.evaluation.tasks.run_folder import Answer, RunFolder

Figures = dict[str, Any]

DENSE = "dense"
"""The method that the others are compared with."""

FAILED = "failed: "
"""How the reason begins for which an answer that failed is left out."""


def summarise(answers: Iterable[Answer], left_out: Iterable[LeftOut] = ()) -> dict[str, Any]:
    """The figures of one method.

    Returns:
        ``samples``, the number of answers that count; ``left_out``, the reasons of the others with how many there are
        of each; ``score``, the mean of the groups' means, with ``interval``, its 95 % bootstrap interval;
        ``kv_read_fraction`` and ``draft_read_fraction``, means over the samples; ``accepted_per_round``, how many
        rounds accepted 0, 1, 2, ... draft tokens, and ``accepted_mean``; ``tokens_per_second`` of a request while it is
        decoded beside the others of its batch; ``groups``, the same figures for each group.
    """
    # Scores end in any order, and what is drawn for an interval must not depend on it.
    answers = sorted(answers, key=lambda answer: answer.id)
    reasons = [item.reason for item in left_out] + [f"{FAILED}{a.error}" for a in answers if a.error]
    good = [answer for answer in answers if answer.error is None]
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in good:
        groups[answer.group].append(answer)
    return {
        "samples": len(good),
        "left_out": dict(Counter(reasons)),
        **(_figures(list(groups.values())) if good else {}),
        "groups": {
            name: {"samples": len(group), **_figures([group])}
            for name, group in sorted(groups.items())
            if name
        },
    }


def current_summary(folder: RunFolder) -> dict[str, Any]:
    """The summary of a run with its figures as the answers stand now, without the task or the models.

    A run that was killed has not written them at its end; its methods, how many samples it asks and which it leaves out
    are in the summary that it wrote at its beginning.

    Raises:
        UsageError: if the run has not begun to ask.
    """
    summary = folder.summary()
    asked = summary.get("asked")
    answers = {method: folder.answers(method) for method in summary["methods"]}
    found = {}
    for method, before in summary["methods"].items():
        left_out = [
            LeftOut("", reason)
            for reason, count in before["left_out"].items()
            if not reason.startswith(FAILED)
            for _ in range(count)
        ]
        complete = before["complete"] if asked is None else len(answers[method]) == asked
        found[method] = {**summarise(answers[method].values(), left_out), "complete": complete}
    return {**summary, "methods": beside_dense(found, answers)}


def beside_dense(
    figures: dict[str, Figures], answers: Mapping[str, Mapping[str, Answer]]
) -> dict[str, Figures]:
    """The figures of each method, with ``against_dense`` where dense answers are there to compare its own with."""
    if DENSE not in answers:
        return figures
    return {
        method: own if method == DENSE else own | {"against_dense": paired(answers[method], answers[DENSE])}
        for method, own in figures.items()
    }


def _figures(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    answers = [answer for group in groups for answer in group]
    scores = [[answer.score for answer in group] for group in groups]
    accepted = [count for answer in answers for count in answer.accepted_per_round]
    histogram = Counter(accepted)
    return {
        "score": fmean(map(fmean, scores)),
        "interval": interval(scores),
        "kv_read_fraction": fmean(answer.kv_read_fraction for answer in answers),
        "draft_read_fraction": fmean(answer.draft_read_fraction for answer in answers),
        "accepted_per_round": [histogram[count] for count in range(max(accepted, default=-1) + 1)],
        "accepted_mean": fmean(accepted) if accepted else 0.0,
        "tokens_per_second": _rate(answers),
    }


def _rate(answers: Sequence[Answer]) -> float:
    """Tokens after the first, which comes with the prompt, over the time that they took."""
    seconds = sum(answer.seconds.get("decode", 0.0) for answer in answers)
    return sum(max(0, answer.new_tokens - 1) for answer in answers) / seconds if seconds else 0.0
