"""Data files of published benchmarks: one JSON object a line, or a JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specattn.errors import UsageError
from specattn.evaluation.documents import read_text


def read_jsonl(path: Path | str, *fields: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; empty lines are passed over.

    Args:
        fields: what every object must have.

    Raises:
        UsageError: if the file cannot be read, or naming the line that is no such object.
    """
    return list(_rows(path, fields))


def read_json(path: Path | str) -> Any:
    """A JSON document.

    Raises:
        UsageError: if the file cannot be read or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}; download it again") from None


def _rows(path: Path | str, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    # Only a line feed ends a line: the texts hold other separators that splitlines would cut at.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(
                f"{path}, line {number}, is not JSON: {error}; download the file again"
            ) from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise UsageError(
                f"{path}, line {number}, has no {missing[0]!r}; each line must hold {', '.join(fields)}"
            )
        yield row


def load_rows(
    source: str, *fields: str, split: str = "test", subset: str | None = None
) -> list[dict[str, Any]]:
    """The rows of a benchmark: a file with JSON lines, or a data set of the hub where ``datasets`` is installed.

    Args:
        source: a path, or a hub id ``owner/name``.
        fields: what every row must have.
        split, subset: of the hub's data set.

    Raises:
        UsageError: if there is no such file and it cannot be a hub id, or the rows are not as expected.
    """
    if not source:
        raise UsageError("no data was given; name the published file, or a hub id, with --data")
    if Path(source).exists() or source.count("/") != 1 or source.endswith((".jsonl", ".json")):
        return read_jsonl(source, *fields)
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"there is no file {source}, and reading it from the hub needs: pip install datasets"
        ) from None
    try:
        rows = [dict(row) for row in load_dataset(source, subset, split=split)]
    except Exception as error:  # what a hub client raises is its own affair
        raise UsageError(
            f"cannot load {source} from the hub: {error}; check the id and the connection"
        ) from error
    if rows and (missing := [name for name in fields if name not in rows[0]]):
        raise UsageError(f"{source} has no column {missing[0]!r}; its columns: {', '.join(rows[0])}")
    return rows
