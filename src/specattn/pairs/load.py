"""From names to a loaded pair: find both models, check that they fit, then load the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specattn.errors import SpecAttnError, UsageError
from specattn.pairs.builtin import BUILTIN, MODELS, suggest
from specattn.pairs.checks import check_config, check_modules, check_rows, check_smaller, check_tokenizers
from specattn.pairs.pair import Pair
from specattn.pairs.source import Source, locate, open_source
from specattn.pairs.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pair(
    name: str | None = None,
    *,
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    yarn: float | None = None,
) -> Pair:
    """Load a built-in pair by ``name``, or any ``target`` with or without a ``draft``.

    Args:
        name: one of ``BUILTIN``.
        target, draft: a hub id, a folder, a GGUF file or one of ``MODELS``.
        device: default CUDA if there is any, else the CPU.
        dtype: default bfloat16; ``"auto"`` takes what the target's checkpoint has (GGUF: bfloat16).
        yarn: stretch the context of both models by this factor, see :mod:`specattn.pairs.yarn`.

    Raises:
        UsageError: an unknown name, a model that cannot be found or is not supported, models that do not fit.
        SpecAttnError: the weights could not be converted or do not fit on the device.
    """
    resolve_device(device)
    return find_pair(name, target=target, draft=draft, dtype=dtype, yarn=yarn).load(device)


def make_pair(
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
) -> Pair:
    """A pair of loaded models, after the same checks; sets both to eval mode, without gradients.

    Raises:
        UsageError: a model that is not supported, models that do not fit or lie on different devices.
    """
    models = [model for model in (target_model, draft_model) if model is not None]
    names = [model.config._name_or_path or model.config.model_type for model in models]
    for model, label in zip(models, names, strict=True):
        check_config(model.config, label)
        check_modules(model, label)
        model.requires_grad_(False).eval()
    if draft_model is not None:
        check_rows(target_model.config, draft_model.config, len(tokenizer))
        check_smaller(target_model.num_parameters(), draft_model.num_parameters())
        _check_placement(target_model, draft_model)
    return Pair(name or " + ".join(names), target_model, draft_model, tokenizer, _mapping_file(name))


def find_pair(
    name: str | None = None,
    *,
    target: str | Path | None = None,
    draft: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    yarn: float | None = None,
) -> FoundPair:
    """Find a pair and make sure that its models fit, without reading their weights.

    Args and errors are those of :func:`load_pair`.
    """
    dtype = resolve_dtype(dtype)
    references, label = _references(name, target, draft)
    locations = [locate(reference, dtype) for reference in references]
    sources = [open_source(ref, place, dtype) for ref, place in zip(references, locations, strict=True)]
    if len(sources) == 2:
        check_sources(*sources)
    if yarn is not None:
        sources, label = [source.stretched(yarn) for source in sources], f"{label} (YaRN {yarn:g})"
    return FoundPair(label, sources[0], sources[1] if sources[1:] else None, dtype, _mapping_file(name))


@dataclass(frozen=True)
class FoundPair:
    """A pair whose models are found and fit each other; enough to refuse a request before weights are read."""

    name: str
    target: Source
    draft: Source | None
    dtype: torch.dtype | str
    mapping_file: Path | None

    @property
    def sources(self) -> list[Source]:
        """The target, and the draft if there is one."""
        return [self.target] if self.draft is None else [self.target, self.draft]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.target.tokenizer

    @property
    def context_limit(self) -> int:
        """See :attr:`Pair.context_limit`."""
        return min(source.config.max_position_embeddings for source in self.sources)

    def load(self, device: str | torch.device | None = None) -> Pair:
        """Read the weights.

        Raises:
            UsageError: the device is not there, or weights are missing.
            SpecAttnError: the weights do not fit on the device.
        """
        device = resolve_device(device)
        target = load_model(self.target, device, self.dtype)
        draft = None if self.draft is None else load_model(self.draft, device, target.dtype)
        return Pair(self.name, target, draft, self.tokenizer, self.mapping_file)


def _check_placement(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    ours, theirs = (target.device, target.dtype), (draft.device, draft.dtype)
    if ours != theirs:
        raise UsageError(
            f"the target is on {ours[0]} in {ours[1]}, the draft on {theirs[0]} in {theirs[1]}."
            " Move the draft: draft.to(target.device, target.dtype)."
        )


def check_sources(target: Source, draft: Source) -> None:
    """Everything that can be known about two models together before their weights are read."""
    check_tokenizers(target.tokenizer, draft.tokenizer)
    check_rows(target.config, draft.config, len(target.tokenizer))
    check_smaller(target.parameters(), draft.parameters())


def load_model(source: Source, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model's weights on ``device``, in eval mode, without gradients.

    Raises:
        UsageError: the weights cannot be read, or some are missing.
        SpecAttnError: they do not fit on the device.
    """
    options = {"config": source.config} if source.yarn is not None else {}
    model = read_weights(source.name, source.location, dtype=dtype, attn_implementation="sdpa", **options)
    check_modules(model, source.name)
    try:
        return model.requires_grad_(False).eval().to(device)
    except torch.OutOfMemoryError as error:
        raise SpecAttnError(
            f"{source.name} does not fit on {device}: {error} Free its memory, or use a smaller model."
        ) from error


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device itself; None is CUDA if there is any, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not a device. Use cpu, cuda or cuda:N.") from error
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise UsageError(f"device {device!r} is not there: torch finds {count} CUDA device(s). Use cpu.")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype or ``"auto"``; None is bfloat16."""
    if dtype is None:
        return torch.bfloat16
    if dtype == "auto" or dtype in _DTYPES.values():
        return dtype
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported. Use one of: auto, {', '.join(_DTYPES)}.")
    return _DTYPES[str(dtype)]


def _references(
    name: str | None, target: str | Path | None, draft: str | Path | None
) -> tuple[list[str], str]:
    """What to load, target first, and what to call the pair."""
    if name is not None and (target is not None or draft is not None):
        raise UsageError(f"pair {name!r} names both models: leave out target and draft, or the pair.")
    if name in BUILTIN:
        return [BUILTIN[name].target, BUILTIN[name].draft], name
    if name is not None:
        raise UsageError(
            f"unknown pair {name!r}. Known pairs: {', '.join(BUILTIN)}; a single model, such as"
            f" {', '.join(MODELS)}, a hub id, a folder or a GGUF file, is given as target.{suggest(name)}"
        )
    if target is None:
        raise UsageError(
            f"no target given. Name a built-in pair ({', '.join(BUILTIN)}) or a target and its draft."
        )
    references = [str(ref) for ref in (target, draft) if ref is not None]
    return references, " + ".join(references)


def _mapping_file(name: str | None) -> Path | None:
    """The mapping that is shipped for a built-in pair."""
    path = Path(__file__).parent.parent / "mapping" / "data" / f"{name}.safetensors"
    return path if name in BUILTIN and path.is_file() else None
