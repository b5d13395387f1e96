"""Two methods compared sample by sample: both answered the same questions, and intervals of each alone ignore it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from specattn.evaluation.bootstrap import interval
from specattn.evaluation.tasks.run_folder import Answer


def paired(answers: Mapping[str, Answer], reference: Mapping[str, Answer]) -> dict[str, Any] | None:
    """How the scores of a method differ from another's, over the samples that both have answered.

    Args:
        answers: by the sample's id.
        reference: the other method's.

    Returns:
        ``samples``, their number; ``difference``, the mean of the groups' mean differences, with ``interval``, its 95 %
        bootstrap interval; ``better`` and ``worse``, how many samples score higher and lower than the reference's.
        ``None`` if no sample has two answers.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for id, answer in answers.items():
        other = reference.get(id)
        if other is not None and answer.error is None and other.error is None:
            groups[answer.group].append(answer.score - other.score)
    if not groups:
        return None
    scores = list(groups.values())
    differences = [difference for group in scores for difference in group]
    return {
        "samples": len(differences),
        "difference": fmean(map(fmean, scores)),
        "interval": interval(scores),
        "better": sum(difference > 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences),
    }
