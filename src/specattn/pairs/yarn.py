"""YaRN (Peng et al. 2023): a model's rotary embedding, stretched to contexts beyond those it was trained on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from specattn.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stretched(config: PreTrainedConfig, factor: float, name: str) -> PreTrainedConfig:
    """A copy of a configuration whose context is ``factor`` times as long; sliding-window layers stay as they are.

    Raises:
        UsageError: if the factor is not above 1, or the model's rotary embedding is scaled already.
    """
    if not factor > 1:
        raise UsageError(f"yarn={factor:g} must be above 1; leave it out to keep the model's own context")
    trained = config.max_position_embeddings
    new: Any = copy.deepcopy(config)
    parameters: dict[str, Any] = new.rope_parameters
    nested = any(isinstance(value, dict) for value in parameters.values())
    for layer_type, rope in parameters.items() if nested else [("", parameters)]:
        if layer_type == "sliding_attention":
            continue
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise UsageError(f"{name} has {kind} rotary embeddings already; leave yarn={factor:g} out")
        rope.update(rope_type="yarn", factor=float(factor), original_max_position_embeddings=trained)
    new.max_position_embeddings = int(trained * factor)
    return new
