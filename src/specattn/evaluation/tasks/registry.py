"""The tasks by name."""

from __future__ import annotations

from typing import Any

from specattn.evaluation.tasks.base import Task
from specattn.registry import Registry

TASKS: dict[str, str] = {
    "passkey": "specattn.evaluation.tasks.passkey:Passkey",
    "needle": "specattn.evaluation.tasks.needle:Needle",
    "ruler": "specattn.evaluation.tasks.ruler:Ruler",
    "humaneval": "specattn.evaluation.tasks.humaneval:HumanEval",
    "gsm8k": "specattn.evaluation.tasks.gsm8k:GSM8K",
    "longbench": "specattn.evaluation.tasks.longbench:LongBench",
    "longbench2": "specattn.evaluation.tasks.longbench2:LongBench2",
    "infinitebench": "specattn.evaluation.tasks.infinitebench:InfiniteBench",
    "specbench": "specattn.evaluation.tasks.specbench:SpecBench",
}
"""Where each task lives; its module is imported when it is asked for."""

REGISTRY = Registry("task", Task, TASKS, group="specattn.tasks")


def get_task(name: str, **options: Any) -> Task:
    """Build a task from its name and options, see :meth:`specattn.registry.Registry.get`."""
    return REGISTRY.get(name, **options)


def parse_task(text: str, **defaults: Any) -> Task:
    """Build a task from ``name:option=value``, see :meth:`specattn.registry.Registry.parse`."""
    return REGISTRY.parse(text, **defaults)
