"""How far the attention outputs of sparse layers are from exact ones, on the very keys and values that they read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.attention import LayerCall, Step
from specattn.kernels.dense_attention import attention_probabilities, weighted_values
from specattn.kernels.sparse_attention import sparse_attention
from specattn.selection.base import Selection


@dataclass(frozen=True)
class LayerErrors:
    """Of one layer: how often an output was off by more than the tolerance, and what was read for it.

    Attributes:
        outputs: outputs of a query head that were compared.
        violations: how many of them have a relative error above the tolerance.
        joined, joined_violations: the same for all heads of a row taken together.
        mean_error: mean relative error of a head's output.
        read: share of the visible tokens that the lists hold.
        capped: share of the lists that a limit kept too short.
    """

    layer: int
    outputs: int
    violations: int
    joined: int
    joined_violations: int
    mean_error: float
    read: float
    capped: float


class OutputErrors:
    """Observes sparse layers, and compares their outputs with dense attention's.

    Args:
        eps: the relative error, in Euclidean norm, from which on an output is a violation.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self._sums: dict[int, Tensor] = {}

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        keys, values = step.cache.gather(call.layer, step.slots, selection.indices)
        query = call.query.float()
        # Computed again, since the output itself is rounded to the model's precision.
        found = sparse_attention(query, keys, values, selection, step.positions, call.scaling)
        exact = torch.stack([_exact(step, call, request) for request in range(len(step.starts))])
        visible = (step.positions[:, -1:] + 1) * torch.ones_like(selection.counts)
        capped = torch.zeros_like(visible) if selection.capped is None else selection.capped
        errors = relative_error(found, exact)
        joined = relative_error(found.flatten(2), exact.flatten(2))
        figures = [
            *(errors.numel(), (errors > self.eps).sum()),
            *(joined.numel(), (joined > self.eps).sum()),
            *(errors.sum(), selection.counts.sum(), visible.sum()),
            *(capped.sum(), capped.numel()),
        ]
        sums = torch.stack([torch.as_tensor(each, device=query.device).double() for each in figures])
        self._sums[call.layer] = self._sums.get(call.layer, 0) + sums

    def layers(self) -> list[LayerErrors]:
        """What was seen, layer by layer."""
        return [_layer(layer, sums.tolist()) for layer, sums in sorted(self._sums.items())]


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    """``|found - exact| / |exact|`` over the last dimension."""
    return (found.double() - exact.double()).norm(dim=-1) / exact.double().norm(dim=-1)


def _exact(step: Step, call: LayerCall, request: int) -> Tensor:
    """``[rows, query_heads, head_dim]``."""
    segments, first = step.segments(call.layer, request, None)
    query = call.query[request]
    return weighted_values(
        attention_probabilities(query, segments, step.starts[request], first, call.scaling), segments
    )


def _layer(layer: int, sums: list[float]) -> LayerErrors:
    outputs, violations, joined, joined_violations, error, read, visible, capped, lists = sums
    return LayerErrors(
        layer,
        int(outputs),
        int(violations),
        int(joined),
        int(joined_violations),
        error / outputs,
        read / visible,
        capped / lists,
    )
