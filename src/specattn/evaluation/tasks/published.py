"""Data of published benchmarks: files that are at hand, or those of the hub; and prompts cut to the context."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError
from specattn.evaluation.tasks.data import read_jsonl
from specattn.evaluation.tasks.options import DataFile

if TYPE_CHECKING:
    from specattn.pairs import FoundPair, Pair

CHAT_ROOM = 128
"""Tokens that are left free for a chat template and for what a cut changes where its halves meet."""


@dataclass(frozen=True)
class Hub:
    """Where a benchmark's files are on the Hugging Face hub.

    Attributes:
        repository: of the data set.
        archive: a zip file that holds the files in a folder; empty if they lie in the repository itself.
    """

    repository: str
    archive: str = ""

    def fetch(self, name: str) -> Path:
        """The file of this name, from the hub or its local cache.

        Raises:
            UsageError: if it cannot be had; the message says what to do instead.
        """
        from huggingface_hub import hf_hub_download

        wanted = self.archive or name
        try:
            found = Path(hf_hub_download(self.repository, wanted, repo_type="dataset"))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"cannot get {wanted} of the data set {self.repository} from the hub: {reason}; download it "
                "and give its place as data=PATH"
            ) from error
        return unpack(found, name) if self.archive else found


def find_file(data: DataFile, name: str, hub: Hub) -> Path:
    """The file ``name``: ``data`` itself, in the folder or zip file ``data``, or from the hub if it is empty.

    Raises:
        UsageError: if it is not there.
    """
    if not data:
        return hub.fetch(name)
    if data.path.suffix == ".zip":
        return unpack(data.path, name)
    if not data.path.is_dir():
        return data.path
    found = [place for place in (data.path / name, data.path / "data" / name) if place.exists()]
    if not found:
        raise UsageError(f"there is no {name} in {data}; download it from {hub.repository} on the hub")
    return found[0]


def unpack(archive: Path, name: str) -> Path:
    """The file ``name`` of a zip file, from any folder in it; it is unpacked beside the archive once.

    Raises:
        UsageError: if the archive cannot be read, does not hold the file, or there is no room for it.
    """
    folder = archive.with_suffix("")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.namelist() if member.rsplit("/", 1)[-1] == name]
            if not members:
                raise UsageError(f"there is no {name} in {archive}; download it again")
            place = folder / members[0]
            if not place.exists() or place.stat().st_size != opened.getinfo(members[0]).file_size:
                opened.extract(members[0], folder)
            return place
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot unpack {archive}: {reason}; download it again") from error


def read_rows(data: DataFile, name: str, hub: Hub, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the file ``name`` with one JSON object a line, see :func:`find_file` and ``read_jsonl``.

    Raises:
        UsageError: as they do, and if ``data`` is a file of another name.
    """
    path = find_file(data, name, hub)
    if path.exists() and path.name != name:
        raise UsageError(f"{path} is not {name}; give its folder, or ask for the data set of this file only")
    return read_jsonl(path, *fields)


@cache
def prompts(benchmark: str) -> dict[str, Any]:
    """What a benchmark publishes of its tasks: prompts, lengths of answers, scores."""
    text = files("specattn.evaluation.tasks").joinpath("prompts", f"{benchmark}.json").read_text("utf-8")
    return dict(json.loads(text))


def check_names(task: str, asked: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """The data sets to ask; all if none was named.

    Raises:
        UsageError: if one is unknown.
    """
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UsageError(f"{task} has no data set {unknown[0]!r}; known: {', '.join(known)}")
    return asked or known


def room(pair: Pair | FoundPair, max_new_tokens: int, longest: int = 0) -> int:
    """Tokens that a prompt may have beside its answer; ``longest`` bounds them further if it is not 0."""
    free = pair.context_limit - max_new_tokens - CHAT_ROOM
    return min(free, longest) if longest else free


def cut_middle(tokenizer: Any, text: str, limit: int) -> tuple[str, int]:
    """A text of at most about ``limit`` tokens, without its middle where it was longer, and how many were dropped.

    Beginning and end stay, as instructions stand there (LongBench, section 4.1). ``limit`` is at least 2.
    """
    tokens = list(tokenizer(text)["input_ids"])
    if len(tokens) <= limit:
        return text, 0
    half = limit // 2
    ends = (tokens[:half], tokens[-half:])
    kept = "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends)
    return kept, len(tokens) - 2 * half
