"""Reading a model's weights: all of them, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_weights(name: str, location: str | Path, **options: Any) -> PreTrainedModel:
    """The model at ``location`` (a folder or a hub id), loaded by transformers with these ``options``.

    transformers fills in random numbers for weights that a checkpoint lacks, and only logs it.

    Raises:
        UsageError: the checkpoint cannot be read, or lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{name}: the weights in {location} cannot be read: {error}") from error
    model, info = loaded
    if missing := info["missing_keys"]:
        raise UsageError(
            f"{name}: {location} lacks {len(missing)} weights of a {model.config.model_type} model, such as"
            f" {min(missing)}. Download it again, or use another copy of the model."
        )
    return model
