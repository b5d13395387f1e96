"""The folder of a run: what was asked, where, every answer as it came, and the summary.

=======================  =======================================================================================
``config.json``          what the answers depend on; a run goes on only with the same
``environment.json``     a list of the environments that it ran in, mostly one
``samples-METHOD.jsonl`` an answer a line, appended and flushed as each ends
``summary.json``         the figures of every method, written anew at each beginning and end
=======================  =======================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specattn.errors import SpecAttnError, UsageError
from specattn.files import is_temporary, write_file, write_new

KIND, VERSION = "specattn run", 1


@dataclass(frozen=True)
class Answer:
    """A line of a samples file.

    Attributes:
        id, group, metadata, references: of the sample.
        output: the generated text.
        score: the task's; 0 for an answer that failed.
        prompt_tokens, new_tokens: read and generated.
        accepted_per_round, kv_read_fraction, draft_read_fraction, prefill_computed, finish_reason, seconds: see
            :class:`~specattn.request.GenerationResult`.
        error: why there is no answer; such a sample is asked again when the run goes on.
    """

    id: str
    group: str
    output: str
    score: float
    references: list[str]
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    accepted_per_round: list[int]
    kv_read_fraction: float
    draft_read_fraction: float
    prefill_computed: float
    seconds: dict[str, float]
    metadata: dict[str, object] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """A folder that :meth:`open` has checked."""

    path: Path

    @classmethod
    def open(cls, path: Path | str, config: dict[str, Any]) -> RunFolder:
        """A new run, or one that goes on. Of processes that begin the same run at once, one makes it.

        Raises:
            UsageError: if the folder holds a run with another configuration or something else, or cannot be written.
        """
        folder = cls(Path(path))
        config = json.loads(json.dumps({"kind": KIND, "version": VERSION, **config}, default=str))
        # Files first: what another process that begins the run now adds comes after its config.json.
        holds_files = folder.path.is_dir() and not all(map(is_temporary, folder.path.iterdir()))
        if holds_files and not folder._config.exists():
            raise UsageError(f"--run {path} holds files but no run; choose a new folder")
        if holds_files or not write_new(folder._config, _encode(config), "the run's config"):
            _check_same(folder.path, folder.config(), config)
        return folder

    @classmethod
    def read(cls, path: Path | str) -> RunFolder:
        """A run that there is, to report on.

        Raises:
            UsageError: if the folder holds no run.
        """
        folder = cls(Path(path))
        folder.config()
        return folder

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    def config(self) -> dict[str, Any]:
        """What the answers depend on.

        Raises:
            UsageError: if the folder holds no run.
        """
        config = self._read(self._config)
        if not isinstance(config, dict) or config.get("kind") != KIND:
            raise UsageError(f"{self.path} holds no run of `specattn eval`; check the path")
        if config.get("version") != VERSION:
            raise UsageError(
                f"{self.path} holds a run of version {config.get('version')}; this specattn reads {VERSION}: run anew"
            )
        return config

    def environments(self) -> list[dict[str, Any]]:
        """Where the run was at work."""
        path = self.path / "environment.json"
        return list(self._read(path)) if path.exists() else []

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Note where the run is at work now."""
        known = self.environments()
        if environment not in known:
            self._write(self.path / "environment.json", [*known, environment])

    def summary(self) -> dict[str, Any]:
        """The figures, as :func:`~specattn.evaluation.tasks.summary.summarise` made them.

        Raises:
            UsageError: if the run has not come so far.
        """
        return dict(self._read(self.path / "summary.json"))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace the summary."""
        self._write(self.path / "summary.json", summary)

    def samples_file(self, method: str) -> Path:
        """Where the answers of a method are; ``method`` is its text with options."""
        return self.path / f"samples-{re.sub(r'[^A-Za-z0-9.=_-]+', '_', method).strip('_')}.jsonl"

    def answers(self, method: str) -> dict[str, Answer]:
        """The answers that a method has so far, by the sample's id; the last of several counts."""
        path = self.samples_file(method)
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        # What follows the last line feed was cut off by an interruption.
        answers = [Answer(**json.loads(line)) for line in lines[:-1]]
        return {answer.id: answer for answer in answers}

    def append(self, method: str, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            SpecAttnError: if it cannot be written, as when the disk is full; the earlier ones are kept.
        """
        path = self.samples_file(method)
        line = json.dumps(asdict(answer), default=str) + "\n"
        try:
            with path.open("ab") as file:
                _drop_partial_line(path, file.tell())
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SpecAttnError(
                f"cannot write to {path}: {error.strerror or error}; nothing before it is lost. "
                "Make room, then give the same command again and the run goes on"
            ) from error

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not JSON"
            raise UsageError(f"cannot read {path}: {reason}; check the path") from None

    def _write(self, path: Path, content: Any) -> None:
        write_file(path, _encode(content), "the run's " + path.stem)


def _encode(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _drop_partial_line(path: Path, size: int) -> None:
    """Cut off what follows the last line feed: an interruption or a full disk left it."""
    if size == 0:
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < size:
        os.truncate(path, whole)


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return
    name = changed[0]
    with contextlib.suppress(TypeError, AttributeError):
        # Of nested options, name the one that differs.
        inner = {**before[name], **now[name]}
        key = next(key for key in inner if before[name].get(key) != now[name].get(key))
        before, now, name = before[name], now[name], key
    raise UsageError(
        f"--run {path} was begun with {name}={before.get(name)!r}, not {now.get(name)!r}; "
        "choose a new folder, or give the same options to go on"
    )
