"""A task under several decode methods: the prompt is read, then every token is decoded with the method.

The target reads a prompt densely, or by a prefill method; all tokens of the answer after the first, which comes with
the prompt, are decoded with the method. Answers are greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from specattn.engine import Engine
from specattn.environment import environment
from specattn.errors import SpecAttnError
from specattn.evaluation.tasks.base import Sample, Task
from specattn.evaluation.tasks.questions import Question, Questions
from specattn.evaluation.tasks.run_folder import Answer, RunFolder
from specattn.evaluation.tasks.scoring import Scoring
from specattn.evaluation.tasks.summary import beside_dense, summarise
from specattn.mapping.artifact import Mapping
from specattn.pairs import FoundPair, Pair
from specattn.prefill.base import PrefillMethod
from specattn.request import GenerationResult
from specattn.selection.base import Method
from specattn.selection.checks import check_at_least

Progress = Callable[[str, int], None]
"""Called with a method's text and how many of its answers are new."""


def configuration(
    pair: Pair | FoundPair,
    task: Task,
    questions: Questions,
    *,
    chat: bool = False,
    mapping: Mapping | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What the answers of a run depend on, apart from the method: all methods of a run have it in common.

    Args:
        engine: further options of the :class:`~specattn.engine.Engine`, such as ``prefill`` and ``gamma``.
    """
    return {
        "task": task.name,
        "metric": task.metric,
        "options": task.options(),
        "pair": pair.name,
        "dtype": str(pair.dtype).removeprefix("torch."),
        "mapping": None if mapping is None else asdict(mapping.metadata),
        "chat": chat,
        "samples": questions.digest,
        "engine": {name: _text(value) for name, value in engine.items()},
    }


def run_task(
    pair: Pair,
    task: Task,
    questions: Questions,
    methods: Sequence[Method],
    folder: RunFolder,
    *,
    mapping: Mapping | None = None,
    batch: int = 8,
    progress: Progress | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Ask all questions that have no answer in ``folder`` yet, with each method; then write the summary.

    Answers are scored by other threads while the next ones are generated, and written as they are scored.

    Args:
        folder: opened with :func:`configuration`.
        batch: questions that are answered at once.
        engine: as for :func:`configuration`.

    Returns:
        The summary, as :func:`summary_of`.

    Raises:
        UsageError: as :class:`~specattn.engine.Engine` does.
        CacheFullError: if a batch does not fit in memory.
        SpecAttnError: if an answer cannot be written.
    """
    check_at_least(task.name, "batch", batch, 1)
    folder.add_environment(environment(pair.device, pair.dtype))
    report = progress or (lambda what, count: None)
    # Also at the beginning: a run that is killed then says what its answers are part of.
    folder.write_summary(summary_of(folder, task, questions, methods))
    try:
        for method in methods:
            _answer(pair, task, questions, method, folder, batch, report, mapping=mapping, **engine)
    except BaseException:
        # After an interruption the summary speaks of what there is; a full disk is no news then.
        with suppress(SpecAttnError):
            folder.write_summary(summary_of(folder, task, questions, methods))
        raise
    summary = summary_of(folder, task, questions, methods)
    folder.write_summary(summary)
    return summary


def summary_of(
    folder: RunFolder, task: Task, questions: Questions, methods: Sequence[Method]
) -> dict[str, Any]:
    """The figures of all methods in ``folder``: these, and those of an earlier summary.

    Where dense answers are there too, ``against_dense`` compares the others with them, sample by sample.

    Returns:
        ``task`` and its ``metric``; ``asked``, the number of samples; ``methods``, the figures of each by its text.
    """
    path = folder.path / "summary.json"
    known = list(folder.summary()["methods"]) if path.exists() else []
    answers = {
        method: folder.answers(method)
        for method in dict.fromkeys([*known, *(method.spec() for method in methods)])
    }
    asked = len(questions.asked)
    figures = {
        method: {**summarise(found.values(), questions.left_out), "complete": len(found) == asked}
        for method, found in answers.items()
    }
    described = {"task": task.name, "metric": task.metric, "asked": asked}
    return {**described, "methods": beside_dense(figures, answers)}


def _answer(
    pair: Pair,
    task: Task,
    questions: Questions,
    method: Method,
    folder: RunFolder,
    batch: int,
    report: Progress,
    **engine: Any,
) -> None:
    """Ask what ``method`` has not answered yet."""
    name = method.spec()
    done = {id for id, answer in folder.answers(name).items() if answer.error is None}
    report(name, len(done))
    waiting = [question for question in questions.asked if question.sample.id not in done]
    if not waiting:
        return
    rooms = sorted((question.room for question in waiting), reverse=True)
    # No fallback: a round that reads everything would say nothing of the method.
    sizes: dict[str, Any] = {"max_batch": batch, "max_tokens": sum(rooms[:batch]), "max_length": rooms[0]}

    def keep(answer: Answer) -> None:
        folder.append(name, answer)
        report(name, 1)

    # The engine ends first, and with it what it holds; then the last scores are waited for.
    with Scoring(keep) as scoring, Engine(pair, method=method, fallback=False, **sizes, **engine) as server:
        asked = {server.submit(question.request): question for question in waiting}
        for update in server.stream():
            if update.result is not None:
                scoring.submit(partial(_scored, task, asked[update.id], update.result))
            scoring.collect()


def _scored(task: Task, question: Question, result: GenerationResult) -> Answer:
    sample: Sample = question.sample
    return Answer(
        id=sample.id,
        group=sample.group,
        output=result.text,
        score=0.0 if result.error else task.score(sample, result.text),
        references=list(sample.references),
        prompt_tokens=result.prompt_tokens,
        new_tokens=len(result.tokens),
        finish_reason=result.finish_reason,
        accepted_per_round=result.accepted_per_round,
        kv_read_fraction=result.kv_read_fraction,
        draft_read_fraction=result.draft_read_fraction,
        prefill_computed=result.prefill_computed,
        seconds=result.seconds,
        metadata=dict(sample.metadata),
        error=result.error,
    )


def _text(value: object) -> object:
    return value.spec() if isinstance(value, Method | PrefillMethod) else value
