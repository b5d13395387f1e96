"""The draft's scores of a round: what decode attention leaves behind for the selection of tokens.

Scores are exported as logits, because a probability needs the sum over all tokens, which is known only when the last
of them was read. ``exp(logit - lse)`` is the probability. Of the two numbers both are given *relative to the logit of
the row's own token*, which changes nothing about their difference and everything about its precision. In the first
layer of Qwen2.5-0.5B logits reach 1443 (median 147; 1,024 tokens of a book), where float16 has steps of 1 and bfloat16
of 8. In the worst of all layers and heads, half the sum of absolute differences between exact and exported
probabilities was .17 for raw logits in float16 and .006 for relative ones; in bfloat16 4.1 and .056. So float16 is the
dtype to export in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import check_shape


@dataclass(frozen=True)
class ScoreExport:
    """Where one layer's scores of one row of the round go.

    Attributes:
        places: int32 ``[query_heads]``: the head's place in the buffers, -1 for heads that are not exported; one
            layer's row of :func:`export_places`.
        logits: ``[batch, export_heads, length]``, float32, float16 or bfloat16; relative to the own token's
            logit. Tokens that the row sees are written, the others are left as they are. Its strides should be
            multiples of 16 elements, so that stores are wide.
        lse: float32 ``[batch, export_heads]``, log-sum-exp, relative to the same; minus infinity where nothing is
            seen.
    """

    places: Tensor
    logits: Tensor
    lse: Tensor

    def check(self, batch: int, query_heads: int) -> None:
        """Refuse buffers that do not fit a launch.

        Raises:
            UsageError: naming the shapes, or strides that the kernels do not take.
        """
        check_shape("places", self.places, query_heads)
        check_shape("logits", self.logits, batch, None, None)
        check_shape("lse", self.lse, batch, self.logits.shape[1])
        if self.logits.stride(-1) != 1 or self.lse.stride(-1) != 1:
            raise UsageError("the last dimension of exported logits and lse must be contiguous")


def export_places(heads: Tensor, layers: int, query_heads: int) -> Tensor:
    """For each layer and head its place in the export: int32 ``[layers, query_heads]``, -1 for the others.

    Args:
        heads: ``[n]``, sorted numbers ``layer * query_heads + head``; the n-th goes to place n.

    Raises:
        UsageError: if the numbers are not ascending, or name heads that there are not.
    """
    heads = heads.long()
    count = layers * query_heads
    if heads.numel() and (bool((heads.diff() <= 0).any()) or int(heads[0]) < 0 or int(heads[-1]) >= count):
        raise UsageError(f"heads {heads.tolist()} are no ascending numbers from 0 to {count - 1}")
    places = torch.full((count,), -1, dtype=torch.int32, device=heads.device)
    places[heads] = torch.arange(len(heads), dtype=torch.int32, device=heads.device)
    return places.view(layers, query_heads)


def relative_logits(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Logits of the last rows of a request, relative to that of the row's own token: float32, for references.

    Args:
        query: ``[rows, query_heads, head_dim]``.
        keys: ``[length, kv_heads, head_dim]``; the last row's own token is the last.

    Returns:
        ``[rows, query_heads, length]``, minus infinity where a row does not see; of a row before the first token
        all.
    """
    rows, query_heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    keys = keys.float().repeat_interleave(query_heads // kv_heads, 1)
    logits = torch.einsum("rhd,nhd->rhn", query.float(), keys) * scaling
    if length == 0:
        return logits
    own = length - rows + torch.arange(rows, device=keys.device)
    anchor = logits.gather(-1, own.clamp(min=0)[:, None, None].expand(rows, query_heads, 1))
    visible = torch.arange(length, device=keys.device) <= own[:, None]
    return (logits - anchor).masked_fill(~visible[:, None], float("-inf"))


def export_reference(export: ScoreExport, request: int, logits: Tensor) -> None:
    """Write a request's scores: ``logits`` ``[query_heads, length]`` of its last row."""
    heads = (export.places >= 0).nonzero().flatten()
    places = export.places[heads].long()
    export.logits[request, places, : logits.shape[-1]] = logits[heads].to(export.logits.dtype)
    export.lse[request, places] = logits[heads].logsumexp(-1)
