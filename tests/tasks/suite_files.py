"""Small files in the form of published benchmarks, and a pair that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny import tiny_tokenizer

from specattn.evaluation.tasks.base import LeftOut, Sample, Task
from specattn.evaluation.tasks.options import DataFile


def reader(context: int = 4000) -> Any:
    """What tasks need of a pair: a tokenizer with a token a character, and a context."""
    return SimpleNamespace(tokenizer=tiny_tokenizer(), context_limit=context, name="tiny")


def write(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> DataFile:
    """A file with one JSON object a line; the result is its folder."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataFile(str(folder))


def asked(task: Task, pair: Any) -> list[Sample]:
    """The samples of a task, none of which may be left out."""
    samples = list(task.samples(pair))
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return samples  # type: ignore[return-value]


def left_out(task: Task, pair: Any) -> list[LeftOut]:
    """What a task leaves out."""
    return [item for item in task.samples(pair) if isinstance(item, LeftOut)]
