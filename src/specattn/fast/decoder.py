"""A transformers decoder, transformed once for decoding: merged products, fused operations between them.

The modules as they come launch some thirty kernels a layer; this is nine, or five for few rows. Weights are shared, not
copied: the merged tensors take the place of their parts in the modules, which go on working.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from specattn.fast.layer import merged
from specattn.fast.operations import Operations, operations_for
from specattn.fast.stream import FusedStream, NewTokens, SeparateStream, Stream
from specattn.kernels.device import LEAST_CAPABILITY
from specattn.kernels.product_tiling import MOST_ROWS, ProductWorkspace
from specattn.kernels.quantised_keys import QuantisedKeys

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders of RMS norms, rotary embeddings over whole heads and gated products, one after the other."""

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on the length of the text."""

LEAST_CHANNELS, MOST_CHANNELS = 32, 256
"""What the kernels take: whole tiles of a head."""

FUSED_LAYER = 96 << 20
"""Bytes of a layer's weights up to which fused products are faster, launches being much of the time.

The 93 MB of Qwen2.5-1.5B take 39 us for 44 at 16 rows, and 41 for 47 at 48.
"""

AttendLayer = Callable[[int, Tensor], Tensor]
"""Attention of one layer: queries ``[batch, rows, query_heads, head_dim]`` to outputs of that shape."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot take the fast path; ``None`` if it can."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"the fast path knows {', '.join(ARCHITECTURES)}, not {config.model_type}"
    rope = model.get_decoder().rotary_emb.rope_type
    if rope not in STATIC_ROPES:
        return f"its rotary embedding is {rope}, which depends on the text's length"
    attention = model.get_decoder().layers[0].self_attn
    if attention.head_dim & (attention.head_dim - 1):
        return f"its heads have {attention.head_dim} channels, which is no power of two"
    if _slides(config):
        return "it has sliding-window layers"
    if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
        return "its gated product is not SiLU without biases"
    return None


def lacks_kernels(model: PreTrainedModel) -> str | None:
    """Why the kernels do not serve ``model`` where it is; ``None`` if they do, or if references take their place."""
    device = model.device
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton, which compiles the kernels, is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        have, need = ("{}.{}".format(*version) for version in (capability, LEAST_CAPABILITY))
        return f"the GPU's compute capability is {have} and the kernels need {need}"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels are made for bfloat16 and float16, not {str(model.dtype).removeprefix('torch.')}"
    channels = model.get_decoder().layers[0].self_attn.head_dim
    if not LEAST_CHANNELS <= channels <= MOST_CHANNELS:
        return f"its heads have {channels} channels; the kernels take {LEAST_CHANNELS} to {MOST_CHANNELS}"
    return None


def _slides(config: Any) -> bool:
    """Whether any layer sees a window only; some configurations say so for each layer, Mistral's for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


class FastDecoder:
    """Runs a model's layers over a paged cache.

    Args:
        model: one for which :func:`unsupported` has no objection.
        length: positions that the rotary tables cover.
        operations: what it computes with; what suits the model's device if ``None``.
    """

    def __init__(self, model: PreTrainedModel, length: int, operations: Operations | None = None) -> None:
        decoder = model.get_decoder()
        self.eps: float = model.config.rms_norm_eps
        self.embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self.head: Tensor = model.get_output_embeddings().weight
        self.norm = decoder.norm.weight
        self.layers = merged(decoder.layers, self.norm)
        self.head_dim: int = decoder.layers[0].self_attn.head_dim
        self.operations: Operations = operations or operations_for(model.device)
        self.workspace = ProductWorkspace.allocate(model.device)
        positions = torch.arange(length, device=model.device)[None]
        # In float32: the tables are rounded to the model's dtype where they are used.
        tables = decoder.rotary_emb(torch.empty(0, device=model.device), positions)
        self.cosine, self.sine = (table[0].float().contiguous() for table in tables)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        attend: AttendLayer,
        copies: Sequence[QuantisedKeys] | None = None,
    ) -> Tensor:
        """Hidden states ``[batch, rows, hidden]`` of ``tokens`` ``[batch, rows]``, normalised for the output head.

        Args:
            positions: int64 ``[batch, rows]``.
            rows: int64 ``[batch, rows]``, pool rows of the new tokens.
            keys, values: the pool, a tensor a layer.
            attend: called in each layer after its keys and values are in the pool.
            copies: quantised keys of each layer that follow the pool, if there are any.
        """
        shape = tokens.shape
        new = NewTokens(self.cosine, self.sine, positions.flatten(), rows.flatten())
        stream = self._stream(self.embedding[tokens.flatten()])
        for number, layer in enumerate(self.layers):
            copy = None if copies is None else copies[number]
            query = stream.query(layer, new, keys[number], values[number], copy)
            attended = attend(number, query.view(*shape, -1, self.head_dim))
            stream.absorb(attended.reshape(shape.numel(), -1), layer)
        return stream.normed(self.norm).view(*shape, -1)

    def _stream(self, rows: Tensor) -> Stream:
        """What ``rows`` ``[rows, hidden]`` are before the first layer."""
        if len(rows) <= MOST_ROWS and self.layers[0].product_bytes <= FUSED_LAYER:
            return FusedStream(rows, self.operations, self.eps, self.layers[0], self.workspace)
        return SeparateStream(rows, self.operations, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``."""
        return linear(hidden, self.head)
