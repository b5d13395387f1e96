"""Reads what a report is made of: JSON documents, folders of task runs and mappings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError
from specattn.report.evaluations import Evaluation, parse_evaluation
from specattn.report.machines import machine

if TYPE_CHECKING:
    from specattn.evaluation.tasks.run_folder import Answer
    from specattn.mapping.artifact import Mapping as LayerMapping

Document = Mapping[str, Any]

ACCEPTED = (
    "a JSON document of `specattn eval`, `generate` or `bench`, the folder of a task run, "
    "or a mapping (.safetensors)"
)


@dataclass(frozen=True)
class TaskRun:
    """What a task run's folder holds.

    Attributes:
        path: the folder.
        config: what the answers depend on.
        environments: where it ran.
        summary: what its command prints, with the figures of each method.
        answers: those of each method.
    """

    path: Path
    config: Document
    environments: Sequence[Document]
    summary: Document
    answers: Mapping[str, Sequence[Answer]]

    @property
    def methods(self) -> Mapping[str, Document]:
        """The figures of each method."""
        return dict(self.summary["methods"])

    @property
    def metric(self) -> str:
        """What the score is called; empty where there is none."""
        return str(self.config["metric"])


@dataclass
class Runs:
    """What was read, by kind; documents with the name of their file.

    Attributes:
        sources: file, kind and machine of each run, in the order given.
    """

    evaluations: list[Evaluation] = field(default_factory=list)
    benchmarks: list[tuple[str, Document]] = field(default_factory=list)
    generations: list[tuple[str, Document]] = field(default_factory=list)
    tasks: list[TaskRun] = field(default_factory=list)
    mappings: list[tuple[str, LayerMapping]] = field(default_factory=list)
    sources: list[tuple[str, str, str]] = field(default_factory=list)


def read_runs(paths: Sequence[Path]) -> Runs:
    """All runs.

    Raises:
        UsageError: if there are none, or one is missing, damaged or of no known kind; the message names it.
    """
    if not paths:
        raise UsageError(f"no run was given; name at least one: {ACCEPTED}")
    runs = Runs()
    for path in paths:
        if path.suffix == ".safetensors":
            _add_mapping(runs, path)
        elif path.is_dir():
            _add_task(runs, path)
        else:
            _add_document(runs, path)
    return runs


def _add_mapping(runs: Runs, path: Path) -> None:
    from specattn.mapping.artifact import Mapping as LayerMapping

    mapping = LayerMapping.load(path)
    runs.mappings.append((path.stem, mapping))
    runs.sources.append((path.name, "mapping", f"specattn {mapping.metadata.specattn}"))


def _add_task(runs: Runs, path: Path) -> None:
    from specattn.evaluation.tasks.run_folder import RunFolder
    from specattn.evaluation.tasks.summary import current_summary

    folder = RunFolder.read(path)
    try:
        summary = current_summary(folder)
        answers = {method: list(folder.answers(method).values()) for method in summary["methods"]}
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the run {path} is damaged ({error}); leave it out, or run anew") from None
    run = TaskRun(path, folder.config(), folder.environments(), summary, answers)
    runs.tasks.append(run)
    where = "; ".join(machine(environment) for environment in run.environments)
    runs.sources.append((path.name, f"task {run.config['task']}", where))


def _add_document(runs: Runs, path: Path) -> None:
    document = read_json(path)
    if "results" in document:
        evaluation = parse_evaluation(document, str(path))
        runs.evaluations.append(evaluation)
        kind = "fidelity" if evaluation.has_divergence else "perplexity"
    elif "rows" in document and "gate" in document:
        runs.benchmarks.append((path.stem, document))
        kind = "benchmark"
    elif "accepted_per_round" in document:
        runs.generations.append((path.stem, document))
        kind = "generation"
    else:
        raise UsageError(f"{path} is no run that a report can show; give {ACCEPTED}")
    runs.sources.append((path.name, kind, machine(document.get("environment") or {})))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: if the file cannot be read or holds something else; the message names the line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text; give {ACCEPTED}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.msg} in line {error.lineno}; give {ACCEPTED}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is JSON but no object; give {ACCEPTED}")
    return document
