"""The figures of runs as one JSON document."""

from __future__ import annotations

from typing import Any

from specattn.evaluation.summary import means
from specattn.report.evaluations import Evaluation
from specattn.report.runs import Runs, TaskRun


def figures(runs: Runs) -> dict[str, Any]:
    """What was given, and the figures of each method in each evaluation and task run."""
    return {
        "sources": [{"name": name, "kind": kind, "environment": where} for name, kind, where in runs.sources],
        "evaluations": [_evaluation(evaluation) for evaluation in runs.evaluations],
        "tasks": [_task(run) for run in runs.tasks],
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Means over the documents."""
    return {
        **evaluation.protocol,
        "documents": list(evaluation.documents),
        "methods": means(evaluation.results),
        "intervals": evaluation.intervals,
        "complete": evaluation.complete,
    }


def _task(run: TaskRun) -> dict[str, Any]:
    """The document that the run's own command prints."""
    config = {name: value for name, value in run.config.items() if name not in ("kind", "version")}
    return {
        "run": str(run.path),
        "config": config,
        "environments": run.environments,
        **run.summary,
        "complete": all(method["complete"] for method in run.methods.values()),
    }
