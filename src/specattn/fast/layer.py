"""The tensors of a decoder layer, those that are multiplied by the same rows merged into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FastLayer:
    """The tensors of one decoder layer.

    Attributes:
        next_norm: the norm of what follows: the next layer's input, or the decoder's output.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    next_norm: Tensor
    head_norms: tuple[Tensor, Tensor, float] | None

    @property
    def product_bytes(self) -> int:
        """Bytes of the weights that rows are multiplied by."""
        return sum(weight.nbytes for weight in (self.qkv, self.out, self.gate_up, self.down))


def merged(layers: Iterable[Any], norm: Tensor) -> list[FastLayer]:
    """A decoder's layers, before its last ``norm``; merged tensors take the place of their parts in the modules."""
    modules = list(layers)
    norms = [layer.input_layernorm.weight for layer in modules[1:]] + [norm]
    return [_merge(layer, following) for layer, following in zip(modules, norms, strict=True)]


def _merge(layer: Any, next_norm: Tensor) -> FastLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [projection.bias for projection in projections]
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    return FastLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=_joined([projection.weight for projection in projections]),
        qkv_bias=None if biases[0] is None else _joined(biases),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
        next_norm=next_norm,
        head_norms=norms,
    )


def _joined(parts: list[nn.Parameter]) -> Tensor:
    """The parts one below the other; each becomes a view of the whole, so that no byte is held twice."""
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole
