"""Where a model comes from: a built-in name, a GGUF file, a folder or the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specattn.errors import UsageError
from specattn.pairs.builtin import BUILTIN, MODELS, BuiltinModel, suggest
from specattn.pairs.checks import check_config
from specattn.pairs.conversions import convert_builtin, convert_file, require_builtin
from specattn.pairs.yarn import stretched

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """A model that is found and checked, but not loaded.

    Attributes:
        name: what the user called it.
        location: a folder or hub id, for ``from_pretrained``.
        yarn: the factor by which ``config`` stretches the context of what is there.
    """

    name: str
    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    yarn: float | None = None

    def stretched(self, factor: float) -> Source:
        """The same model with a context ``factor`` times as long.

        Raises:
            UsageError: as :func:`specattn.pairs.yarn.stretched`.
        """
        return replace(self, config=stretched(self.config, factor, self.name), yarn=factor)

    def parameters(self) -> int:
        """How many parameters the model has, counted without allocating them."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config).num_parameters()


def locate(reference: str, dtype: torch.dtype | str) -> BuiltinModel | Path | str:
    """What a reference means: a built-in model, a file or folder that exists, or a hub id.

    Raises:
        UsageError: a path that leads nowhere, a pair, a built-in model that is not installed.
    """
    if reference in MODELS:
        require_builtin(MODELS[reference], gguf_dtype(dtype))
        return MODELS[reference]
    if reference in BUILTIN:
        raise UsageError(f"{reference!r} is a pair, not a model: give it as the pair's name.")
    path = Path(reference).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UsageError(f"{reference} is a file but not a GGUF file. Give the folder that holds the model.")
    if (
        path.suffix == ".gguf"
        or path.is_absolute()
        or reference.startswith((".", "~"))
        or reference.count("/") > 1
    ):
        raise UsageError(f"{reference} does not exist. Check the path, or give a hub id such as owner/model.")
    return reference


def open_source(name: str, location: BuiltinModel | Path | str, dtype: torch.dtype | str) -> Source:
    """Config and tokenizer of a model, after its architecture is checked; GGUF files are converted here.

    Raises:
        UsageError: the model cannot be found, or is not supported.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = _folder(location, gguf_dtype(dtype))
    try:
        config = AutoConfig.from_pretrained(folder)
        check_config(config, name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(_not_found(name, location, error)) from error
    return Source(name, folder, config, tokenizer)


def gguf_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that GGUF files are converted to: the given one, bfloat16 for ``"auto"``."""
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _folder(location: BuiltinModel | Path | str, dtype: torch.dtype) -> str:
    if isinstance(location, BuiltinModel):
        return str(convert_builtin(location, dtype))
    if isinstance(location, Path) and location.is_file():
        return str(convert_file(location, dtype))
    return str(location)


def _not_found(name: str, location: BuiltinModel | Path | str, error: Exception) -> str:
    reason = str(error).splitlines()[0].rstrip(".")
    if isinstance(location, str):
        return (
            f"{name} cannot be loaded from the Hugging Face hub: {reason}. Check the name, log in with"
            f" `hf auth login` if the model asks for it, or give a local folder.{suggest(name)}"
        )
    return (
        f"{name} cannot be loaded: {reason}. The folder {location} must hold config.json, the tokenizer and"
        " the weights."
    )
