"""Which model a configuration describes, as far as its attention is concerned."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "sliding_window",
    "vocab_size",
)

_YARN = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


def config_hash(config: Any) -> str:
    """SHA-256, in hex, of the fields that fix a model's attention geometry and tell models apart.

    The same for a model from the hub, a folder or a GGUF file, in any precision, by any transformers version:
    names, dtypes, quantisation and the place where the RoPE base is kept do not count. Nor does YaRN, which stretches
    the context of the same model.
    """
    config = config.get_text_config()
    fields = {field: getattr(config, field, None) for field in _FIELDS}
    heads = config.num_attention_heads
    fields["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or heads
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    fields["rope"] = _rope(config)
    return hashlib.sha256(json.dumps(_canonical(fields), sort_keys=True).encode()).hexdigest()


def describe(config: Any) -> str:
    """A name for messages: the path or hub id that the configuration came from, or its shape."""
    name = getattr(config, "_name_or_path", "")
    return name or f"a {config.model_type} model of {config.get_text_config().num_hidden_layers} layers"


def _rope(config: Any) -> dict[str, Any]:
    """The RoPE parameters: of each layer type for some models, with ``rope_theta`` apart in older files."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        parameters = {**(getattr(config, "rope_scaling", None) or {})}
    if any(isinstance(value, dict) for value in parameters.values()):
        return {layer_type: _one_rope(value) for layer_type, value in parameters.items()}
    return _one_rope({"rope_theta": getattr(config, "rope_theta", None), **parameters})


def _one_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    ignored: tuple[str, ...] = ("rope_type", "type")
    if kind == "yarn":
        kind, ignored = "default", ignored + _YARN
    rest = {key: value for key, value in parameters.items() if key not in ignored and value is not None}
    return {"rope_type": kind, **rest}


def _canonical(value: Any) -> Any:
    """``value`` with every number a float, so that 10000 and 10000.0 are the same."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
