"""The residual stream of a decoder, between one attention and the next: products, norms and sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import linear

from specattn.fast.layer import FastLayer
from specattn.fast.operations import Operations
from specattn.kernels.normed_rows import NormedRows
from specattn.kernels.product_tiling import ProductWorkspace
from specattn.kernels.quantised_keys import QuantisedKeys


@dataclass(frozen=True)
class NewTokens:
    """Where the tokens of a pass stand, and where their keys and values go; see :mod:`specattn.kernels.rope_append`.

    Attributes:
        cosine, sine: float32 ``[positions, head_dim]`` tables.
        positions, rows: int64 ``[tokens]``; the latter of the pool.
    """

    cosine: Tensor
    sine: Tensor
    positions: Tensor
    rows: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cosine, self.sine, self.positions, self.rows))


class Stream(Protocol):
    """Rows on their way through the layers; of each layer :meth:`query` comes first, then :meth:`absorb`."""

    def query(
        self, layer: FastLayer, new: NewTokens, keys: Tensor, values: Tensor, copy: QuantisedKeys | None
    ) -> Tensor:
        """The layer's queries ``[rows, query_heads, head_dim]``; its keys and values go to the pool and the copy."""
        ...

    def absorb(self, attended: Tensor, layer: FastLayer) -> None:
        """Add what the layer attended to, ``[rows, query_heads * head_dim]``, and its gated products of that."""
        ...

    def normed(self, gain: Tensor) -> Tensor:
        """The rows behind the last layer, normalised: ``[rows, hidden]``."""
        ...


class SeparateStream:
    """Products by the library, for many rows: what stands between them is seven launches a layer with them."""

    def __init__(self, rows: Tensor, operations: Operations, eps: float) -> None:
        self._operations = operations
        self._eps = eps
        self._change = rows
        self._total: Tensor | None = None

    def query(
        self, layer: FastLayer, new: NewTokens, keys: Tensor, values: Tensor, copy: QuantisedKeys | None
    ) -> Tensor:
        qkv = linear(self._add_norm(layer.input_norm), layer.qkv, layer.qkv_bias)
        return self._operations.rope_append(qkv, *new, keys, values, layer.head_norms, copy)

    def absorb(self, attended: Tensor, layer: FastLayer) -> None:
        self._change = linear(attended, layer.out, layer.out_bias)
        gate_up = linear(self._add_norm(layer.post_norm), layer.gate_up)
        self._change = linear(self._operations.gated(gate_up), layer.down)

    def normed(self, gain: Tensor) -> Tensor:
        return self._add_norm(gain)

    def _add_norm(self, gain: Tensor) -> Tensor:
        normed, self._total = self._operations.add_norm(self._change, self._total, gain, self._eps)
        return normed


class FusedStream:
    """Products of few rows, whose kernels do what stands between them: four launches a layer, and attention.

    Args:
        workspace: of all streams on the device, of which one runs at a time.
    """

    def __init__(
        self, rows: Tensor, operations: Operations, eps: float, first: FastLayer, workspace: ProductWorkspace
    ) -> None:
        self._operations = operations
        self._eps = eps
        self._workspace = workspace
        normed, self._total = operations.add_norm(rows, None, first.input_norm, eps)
        self._normed = NormedRows(normed)

    def query(
        self, layer: FastLayer, new: NewTokens, keys: Tensor, values: Tensor, copy: QuantisedKeys | None
    ) -> Tensor:
        operations, product = self._operations, (self._normed, layer.qkv, layer.qkv_bias)
        if layer.head_norms is None and copy is None:
            return operations.norm_rope_linear(*product, *new, keys, values)
        # What follows needs whole heads, and no program has one.
        qkv = operations.norm_linear(*product)
        return operations.rope_append(qkv, *new, keys, values, layer.head_norms, copy)

    def absorb(self, attended: Tensor, layer: FastLayer) -> None:
        self._add(attended, layer.out, layer.out_bias, layer.post_norm)
        active = self._operations.norm_gated_linear(self._normed, layer.gate_up)
        self._add(active, layer.down, None, layer.next_norm)

    def normed(self, gain: Tensor) -> Tensor:
        return self._operations.add_norm(self._total, None, gain, self._eps)[0]

    def _add(self, rows: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor) -> None:
        self._total, self._normed = self._operations.linear_add(
            rows, weight, bias, self._total, gain, self._eps, self._workspace
        )
