"""A task's command at work: refuse what cannot be, load the models, ask, report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.cli.models import load_mapping
from specattn.cli.options import parse_gamma, parse_methods
from specattn.cli.output import console, print_json
from specattn.cli.progress import Bars
from specattn.cli.tasks.options import RunOptions
from specattn.cli.tasks.tables import show
from specattn.errors import UsageError

if TYPE_CHECKING:
    from specattn.evaluation.tasks.base import Task
    from specattn.evaluation.tasks.run_folder import RunFolder


def execute(task: Task, options: RunOptions) -> RunFolder:
    """Run ``task`` with every method, or go on with a run, and show the figures.

    Raises:
        UsageError: for what cannot be right, before any weights are read.
    """
    from specattn.evaluation.tasks.questions import questions
    from specattn.evaluation.tasks.run_folder import RunFolder
    from specattn.evaluation.tasks.runner import configuration, run_task, summary_of
    from specattn.lossless import check_lossless
    from specattn.mapping.resolve import resolve_mapping
    from specattn.prefill.registry import parse_prefill
    from specattn.selection.eviction import check_prefill

    methods, prefill = parse_methods(options.methods), parse_prefill(options.prefill)
    engine: dict[str, Any] = {"gamma": parse_gamma(options.gamma), "prefill": prefill}
    if options.lossless:
        engine["lossless"] = True
    mapping = load_mapping(options.mapping)
    found = options.models.find()
    prefill.check(found.target.config)
    for method in methods:
        check_prefill(method, prefill)
        check_lossless(method, options.lossless, None)
        resolve_mapping(found, method, mapping)
    asked = questions(found, task, chat=options.chat, limit=options.limit)
    config = configuration(found, task, asked, chat=options.chat, mapping=mapping, **engine)
    folder = RunFolder.open(options.run or _default_folder(config), config)
    console().print(
        f"{len(asked.asked)} samples, {len(asked.left_out)} left out; run {folder.path}", style="dim"
    )
    pair, _ = options.models.load(found)
    failure: BaseException | None = None
    try:
        with Bars(lambda method: len(asked.asked)) as bars:
            run_task(
                pair,
                task,
                asked,
                methods,
                folder,
                mapping=mapping,
                batch=options.batch,
                progress=bars,
                **engine,
            )
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    _report(folder, config, summary_of(folder, task, asked, methods), failure, json=options.json)
    if failure is not None:
        raise failure
    return folder


def _report(
    folder: RunFolder,
    config: dict[str, Any],
    summary: dict[str, Any],
    failure: BaseException | None,
    *,
    json: bool,
) -> None:
    """Show the figures, and after a failure those that there are."""
    figures = list(summary["methods"].values())
    answered = any(each["samples"] for each in figures)
    if isinstance(failure, UsageError) and not answered:
        return  # refused before any work
    if answered or failure is None:
        show(summary)
    if json:
        complete = all(each["complete"] for each in figures)
        where = {"run": str(folder.path), "environments": folder.environments()}
        print_json({**where, "config": config, **summary, "complete": complete})


def _default_folder(config: dict[str, Any]) -> Path:
    """A folder that the same command finds again."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return Path("runs") / f"{config['task']}-{digest[:8]}"
