"""The folder of converted models: each GGUF file is converted once, and found again by its SHA-256."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

from specattn.errors import SpecAttnError, UsageError
from specattn.pairs import gguf
from specattn.pairs.builtin import BuiltinModel
from specattn.pairs.parts import assemble, file_sha256, require_parts


def cache_dir() -> Path:
    """``$SPECATTN_CACHE``, or ``specattn`` in the user's cache folder."""
    if own := os.environ.get("SPECATTN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specattn"


def conversion_path(sha256: str, dtype: torch.dtype) -> Path:
    """Where the conversion of a file with this SHA-256 to this dtype lies, or will lie."""
    return cache_dir() / "models" / f"{sha256[:16]}-{str(dtype).removeprefix('torch.')}"


def convert_file(path: Path, dtype: torch.dtype) -> Path:
    """The folder of a GGUF file's conversion, which is made if it is not there yet.

    Raises:
        UsageError: the file cannot be read, or not be converted.
    """
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    return _conversion(sha256, dtype, path.name, lambda scratch: path)


def convert_builtin(model: BuiltinModel, dtype: torch.dtype) -> Path:
    """The folder of a built-in model's conversion; its parts are needed only to make it."""
    return _conversion(
        model.sha256, dtype, model.name, lambda scratch: assemble(model, scratch / f"{model.name}.gguf")
    )


def require_builtin(model: BuiltinModel, dtype: torch.dtype) -> None:
    """Raise ``UsageError`` if the model is neither converted nor installed."""
    if not conversion_path(model.sha256, dtype).is_dir():
        require_parts(model)


def _conversion(sha256: str, dtype: torch.dtype, name: str, provide: Callable[[Path], Path]) -> Path:
    """The finished conversion, or a new one of the file that ``provide(scratch folder)`` returns.

    Raises:
        SpecAttnError: the cache folder cannot be written, or is full.
    """
    final = conversion_path(sha256, dtype)
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # One process converts, others wait for it: a scratch folder that is there was left by a killed one.
        with FileLock(f"{final}.lock"):
            if not final.is_dir():
                tqdm.write(f"converting {name} to safetensors, once (a minute or two)", file=sys.stderr)
                _convert_into(final, dtype, provide)
    except OSError as error:
        raise SpecAttnError(
            f"could not convert {name} in {final.parent}: {error}. Free some space there (a model takes two"
            " bytes a parameter in bfloat16), or choose another folder with SPECATTN_CACHE."
        ) from error
    return final


def _convert_into(final: Path, dtype: torch.dtype, provide: Callable[[Path], Path]) -> None:
    scratch = final.with_name(f"{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    converted = scratch / "converted"
    try:
        converted.mkdir(parents=True)
        gguf.convert_gguf(provide(scratch), converted, dtype)
        converted.rename(final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
