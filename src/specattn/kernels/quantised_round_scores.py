"""The draft's attention of a whole round from its quantised keys: all layers in one launch.

:mod:`specattn.kernels.round_scores` says what is worked out and why once a round. Its bytes are those of the keys, in
every layer: of 128 bytes that a key of 64 channels has in 16 bits, this reads 68 with 8 bits a channel and 36 with 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_power_of_two, check_shape
from specattn.kernels.quantised_keys import KERNEL_BITS, QuantisedKeys
from specattn.kernels.round_scores import blocks, check_due

BEHIND = 64
"""Tokens behind the last one whose scores are set to 0: what later rounds add to a list must not find old ones."""

LEAST_WORDS = 16
"""Words of 16 bits that the codes of a key fill: what tensor cores multiply at once."""


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut up.

    Attributes:
        tokens: of a tile.
        count: tiles that a program takes one after the other.
        warps: of a program.
        stages: tiles on their way from memory.
    """

    tokens: int
    count: int
    warps: int
    stages: int


def choose_tiles(rows: int, head_dim: int) -> Tiles:
    """What suits tiles of so many rows: sums and codes that a thread's registers hold."""
    tokens = max(min(4096 // rows, 16384 // head_dim), 64)
    return Tiles(tokens, count=2048 // tokens, warps=4 if rows <= 64 else 8, stages=5)


def quantised_round_scores(
    query: Tensor,
    copy: QuantisedKeys,
    batch: PagedBatch,
    lse: Tensor,
    places: Tensor,
    scaling: float,
    *,
    heads_out: Tensor,
    own_out: Tensor,
    due: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Mean attention of a round's rows, ``min(1, exp(scaling * q k - lse))``, of all layers.

    Queries of 16 bits are multiplied as float16, which holds all codes; a channel beyond 65,504 would overflow.

    Args:
        query: ``[rows, layers, batch, query_heads, head_dim]``, the heads of a row contiguous.
        copy: the quantised keys of all layers, ``layers * kv_heads`` heads of them.
        batch: where the tokens lie. Row ``r`` sees ``lengths - rows + 1 + r`` of them.
        lse: float32 ``[rows, layers, batch, query_heads]``, the heads of a row contiguous: log-sum-exps of the rows'
            logits.
        places: int32 ``[layers, query_heads]``: each head's place in ``heads_out``, -1 for those that are not
            exported; see :func:`specattn.kernels.score_export.export_places`.
        heads_out: ``[batch, export_heads, length]``; tokens that the last row sees are written, and zeros behind.
        own_out: ``[slots, layers * kv_heads, length]``, the mean over a group's heads, in the slots of ``batch``.
        due: bool ``[batch, layers * kv_heads]``: KV heads that are not are left as they are in both outputs, and none
            of their keys is read; all are if ``None``.
        tiles: by default what suits the number of rows.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.quantised_round_scores_triton import quantised_round_scores_kernel

    kv_heads = _check(query, copy, batch, lse, places, heads_out, own_out, due)
    check_kernel(copy.head_dim, copy.bits)
    rows, layers, requests, query_heads, head_dim = query.shape
    group = query_heads // kv_heads
    block_rows, block_group = blocks(rows, group)
    tiles = tiles or choose_tiles(block_rows * block_group, head_dim)
    length = own_out.shape[-1]
    grid = (-(-length // (tiles.tokens * tiles.count)), layers * kv_heads, requests)
    quantised_round_scores_kernel[grid](
        query,
        copy.codes.view(torch.int16),
        copy.ranges.view(torch.int32),
        batch.block_table,
        batch.slots,
        batch.lengths,
        lse,
        places,
        heads_out,
        own_out,
        due,
        scaling,
        length,
        copy.codes.shape[1],
        *query.stride()[:3],
        *lse.stride()[:3],
        batch.block_table.stride(0),
        heads_out.stride(0),
        heads_out.stride(1),
        own_out.stride(0),
        own_out.stride(1),
        0 if due is None else due.stride(0),
        ROWS=rows,
        GROUP=group,
        KV_HEADS=kv_heads,
        D=head_dim,
        BITS=copy.bits,
        PAGE=batch.page_size,
        BLOCK_R=block_rows,
        BLOCK_G=block_group,
        BLOCK_N=tiles.tokens,
        TILES=tiles.count,
        BEHIND=BEHIND,
        STAGES=tiles.stages,
        PTX=query.is_cuda and query.dtype != torch.float32,
        num_warps=tiles.warps,
    )


def check_kernel(head_dim: int, bits: int) -> None:
    """Refuse keys that the kernel does not take.

    Raises:
        UsageError: naming the limit.
    """
    if bits not in KERNEL_BITS:
        raise UsageError(f"bits={bits}: the kernel takes 4 or 8; use quantised_round_scores_reference")
    check_power_of_two("head_dim", head_dim, least=16)
    if head_dim * bits < 16 * LEAST_WORDS:
        raise UsageError(
            f"heads of {head_dim} channels of {bits} bits are too narrow: {16 * LEAST_WORDS // bits} channels are "
            "needed; use 8 bits"
        )


def quantised_round_scores_reference(
    query: Tensor,
    copy: QuantisedKeys,
    batch: PagedBatch,
    lse: Tensor,
    places: Tensor,
    scaling: float,
    *,
    heads_out: Tensor,
    own_out: Tensor,
    due: Tensor | None = None,
) -> None:
    """The same in float32 PyTorch, request by request."""
    kv_heads = _check(query, copy, batch, lse, places, heads_out, own_out, due)
    rows, layers, _, query_heads, _ = query.shape
    for request in range(len(batch)):
        keys = copy.dequantise(batch.visible_rows(request)).unflatten(1, (layers, kv_heads))
        keys = keys.repeat_interleave(query_heads // kv_heads, 2)
        logits = torch.einsum("rlhd,nlhd->rlhn", query[:, :, request].float(), keys) * scaling
        token = torch.arange(len(keys), device=keys.device)
        seen = len(keys) - rows + 1 + torch.arange(rows, device=keys.device)
        weights = (logits - lse[:, :, request, :, None]).exp().clamp(max=1)
        mean = weights.masked_fill(token >= seen[:, None, None, None], 0).mean(
            0
        )  # [layers, query_heads, tokens]
        mean = torch.nn.functional.pad(mean, (0, BEHIND))[..., : own_out.shape[-1]]
        end = mean.shape[-1]
        scored = torch.ones_like(own_out[0, :, 0], dtype=torch.bool) if due is None else due[request]
        exported = (places >= 0) & scored.repeat_interleave(query_heads // kv_heads).view_as(places)
        heads_out[request, places[exported].long(), :end] = mean[exported].to(heads_out.dtype)
        own = mean.unflatten(1, (kv_heads, -1)).mean(2).flatten(0, 1)
        own_out[int(batch.slots[request]), scored, :end] = own[scored].to(own_out.dtype)


def _check(
    query: Tensor,
    copy: QuantisedKeys,
    batch: PagedBatch,
    lse: Tensor,
    places: Tensor,
    heads_out: Tensor,
    own_out: Tensor,
    due: Tensor | None,
) -> int:
    """KV heads of a layer."""
    check_shape("query", query, None, None, len(batch), None, copy.head_dim)
    rows, layers, _, query_heads, head_dim = query.shape
    heads = copy.codes.shape[0]
    check_shape("lse", lse, rows, layers, len(batch), query_heads)
    check_shape("places", places, layers, query_heads)
    check_shape("own_out", own_out, None, heads, None)
    check_shape("heads_out", heads_out, len(batch), None, own_out.shape[-1])
    check_due(due, len(batch), heads)
    if heads % layers or query_heads % (heads // layers):
        raise UsageError(
            f"{query_heads} query heads in {layers} layers do not share {heads} heads of quantised keys evenly; "
            "pass the copy of all layers"
        )
    if query.stride()[3:] != (head_dim, 1) or lse.stride(3) != 1 or not places.is_contiguous():
        raise UsageError("the heads of query, lse and places must be contiguous")
    if heads_out.stride(-1) != 1 or own_out.stride(-1) != 1:
        raise UsageError("the last dimension of heads_out and own_out must be contiguous")
    return heads // layers
