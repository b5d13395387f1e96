"""How much attention the last queries of a prompt pay to each key and to each distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.kernels.dense_attention import attention_probabilities
from specattn.prefill.base import PrefillCall


def last_rows(call: PrefillCall, head: int, rows: int) -> Tensor:
    """Attention of one head's last ``rows`` queries, or of as many as the call has: float32 ``[rows, length]``."""
    kv = head // (call.query.shape[1] // call.key.shape[1])
    query = call.query[-rows:, head : head + 1]
    segments = [(call.key[:, kv : kv + 1], call.value[:, kv : kv + 1])]
    return attention_probabilities(query, segments, len(call.key) - len(query), 0, call.scaling)[0]


def line_scores(call: PrefillCall, heads: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Mean attention of the last ``rows`` queries by key and by distance: two float32 ``[heads, length]``.

    One head at a time: memory holds ``rows`` rows of one head, not of all.
    """
    vertical, slash = [], []
    for head in heads:
        probabilities = last_rows(call, head, rows)
        vertical.append(probabilities.mean(0))
        slash.append(diagonal_sums(probabilities) / len(probabilities))
    return torch.stack(vertical), torch.stack(slash)


def diagonal_sums(probabilities: Tensor) -> Tensor:
    """Sums by distance, ``[length]``, of causal rows ``[rows, length]``, the last of them at the last position."""
    rows, length = probabilities.shape
    # Cut into rows that are one shorter, row i of the flipped and padded matrix lies i columns further right.
    wide = pad(probabilities.flip(0), (0, rows)).flatten()[:-rows]
    return wide.view(rows, length + rows - 1).sum(0)[:length].flip(0)
