"""The draft's attention of a whole round, in one pass over its keys after its steps: all layers in one launch.

A draft that reads only its own nucleus in its steps does not see the scores of all tokens there. They are worked out
once for all rows of the round: each key is read once, not once a step, and no value at all. What the mapping needs is
the mean over the rows, so that is what is written: a probability a token and exported head. The steps' log-sum-exps
normalise the rows, though they are sums over what was read. Where attention has moved away from the list, what it has
moved to would weigh many times as much as all of the list, and outweigh all other heads in a mixture. So no token
weighs more than the list does.

Where heads are scored by turns a layer has few that are due. A launch for each would leave most of a GPU idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_power_of_two, check_shape

LEAST_BLOCK = 16
"""Rows of the smallest tile that tensor cores multiply."""

LARGEST_BLOCK = 128
TILE_TOKENS = 128
TILES = 8


def round_scores(
    query: Tensor,
    keys: Tensor,
    batch: PagedBatch,
    lse: Tensor,
    places: Tensor,
    scaling: float,
    *,
    heads_out: Tensor,
    own_out: Tensor,
    due: Tensor | None = None,
) -> None:
    """Mean attention of a round's rows, ``exp(scaling * q k - lse)`` and at most 1, of all layers.

    Args:
        query: ``[rows, layers, batch, query_heads, head_dim]``, the heads of a row contiguous.
        keys: the pool of all layers, ``[layers, pool_rows, kv_heads, head_dim]``, each layer's contiguous.
        batch: where the tokens lie. Row ``r`` sees ``lengths - rows + 1 + r`` of them.
        lse: float32 ``[rows, layers, batch, query_heads]``, the heads of a row contiguous: log-sum-exps of the rows'
            logits.
        places: int32 ``[layers, query_heads]``: each head's place in ``heads_out``, -1 for those that are not
            exported; see :func:`specattn.kernels.score_export.export_places`.
        heads_out: ``[batch, export_heads, length]``; tokens that the last row sees are written, and zeros behind.
        own_out: ``[slots, layers * kv_heads, length]``, the mean over a group's heads, in the slots of ``batch``.
        due: bool ``[batch, layers * kv_heads]``: KV heads that are not are left as they are in both outputs, and none
            of their keys is read; all are if ``None``.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.round_scores_triton import round_scores_kernel

    _check(query, keys, batch, lse, places, heads_out, own_out, due)
    rows, layers, requests, query_heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    group = query_heads // kv_heads
    block_rows, block_group = blocks(rows, group)
    length = own_out.shape[-1]
    grid = (-(-length // (TILE_TOKENS * TILES)), layers * kv_heads, requests)
    round_scores_kernel[grid](
        query,
        keys,
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
        *query.stride()[:3],
        *lse.stride()[:3],
        *keys.stride()[:2],
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
        PAGE=batch.page_size,
        BLOCK_R=block_rows,
        BLOCK_G=block_group,
        BLOCK_N=TILE_TOKENS,
        TILES=TILES,
        num_warps=round_warps(block_rows * block_group),
        num_stages=round_stages(head_dim, keys.element_size()),
    )


def blocks(rows: int, group: int) -> tuple[int, int]:
    """Rows and heads of a tile, powers of two.

    Raises:
        UsageError: if they do not fit.
    """
    block_group = 1 << (group - 1).bit_length()
    block_rows = max(1 << (rows - 1).bit_length(), LEAST_BLOCK // block_group)
    if block_rows * block_group > LARGEST_BLOCK:
        raise UsageError(
            f"{rows} rows of {group} heads a group need a tile of {block_rows * block_group} rows: up to "
            f"{LARGEST_BLOCK} fit; draft fewer tokens a round"
        )
    return block_rows, block_group


def round_warps(rows: int) -> int:
    """Warps of a program with a tile of so many rows."""
    return 4 if rows <= 64 else 8


def round_stages(head_dim: int, itemsize: int) -> int:
    """One more than the tiles on their way from memory: up to 64 KB of keys."""
    return max(2, min(5, 1 + 65536 // (TILE_TOKENS * head_dim * itemsize)))


def round_scores_reference(
    query: Tensor,
    keys: Tensor,
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
    _check(query, keys, batch, lse, places, heads_out, own_out, due)
    rows, _, _, query_heads, _ = query.shape
    kv_heads = keys.shape[2]
    group = query_heads // kv_heads
    for request in range(len(batch)):
        key = keys[:, batch.visible_rows(request)].float().repeat_interleave(group, 2)
        logits = torch.einsum("rlhd,lnhd->rlhn", query[:, :, request].float(), key) * scaling
        token = torch.arange(key.shape[1], device=keys.device)
        seen = len(token) - rows + 1 + torch.arange(rows, device=keys.device)
        weights = (logits - lse[:, :, request, :, None]).exp().clamp(max=1)
        mean = weights.masked_fill(token >= seen[:, None, None, None], 0).mean(
            0
        )  # [layers, query_heads, tokens]
        mean = torch.nn.functional.pad(mean, (0, TILE_TOKENS))[..., : own_out.shape[-1]]
        end = mean.shape[-1]
        scored = torch.ones_like(own_out[0, :, 0], dtype=torch.bool) if due is None else due[request]
        exported = (places >= 0) & scored.repeat_interleave(group).view_as(places)
        heads_out[request, places[exported].long(), :end] = mean[exported].to(heads_out.dtype)
        own = mean.unflatten(1, (kv_heads, -1)).mean(2).flatten(0, 1)
        own_out[int(batch.slots[request]), scored, :end] = own[scored].to(own_out.dtype)


def _check(
    query: Tensor,
    keys: Tensor,
    batch: PagedBatch,
    lse: Tensor,
    places: Tensor,
    heads_out: Tensor,
    own_out: Tensor,
    due: Tensor | None,
) -> None:
    check_shape("query", query, None, None, len(batch), None, None)
    rows, layers, _, query_heads, head_dim = query.shape
    check_shape("keys", keys, layers, None, None, head_dim)
    kv_heads = keys.shape[2]
    check_shape("lse", lse, rows, layers, len(batch), query_heads)
    check_shape("places", places, layers, query_heads)
    check_shape("own_out", own_out, None, layers * kv_heads, None)
    check_shape("heads_out", heads_out, len(batch), None, own_out.shape[-1])
    check_due(due, len(batch), layers * kv_heads)
    check_power_of_two("head_dim", head_dim, least=16)
    if query_heads % kv_heads:
        raise UsageError(f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    if query.stride()[3:] != (head_dim, 1) or lse.stride(3) != 1 or not places.is_contiguous():
        raise UsageError("the heads of query, lse and places must be contiguous")
    if not keys[0].is_contiguous():
        raise UsageError("the pool of a layer's keys must be contiguous")
    if heads_out.stride(-1) != 1 or own_out.stride(-1) != 1:
        raise UsageError("the last dimension of heads_out and own_out must be contiguous")


def check_due(due: Tensor | None, batch: int, heads: int) -> None:
    """Refuse something else than a bool for each request and KV head.

    Raises:
        UsageError: naming shape or dtype.
    """
    if due is None:
        return
    check_shape("due", due, batch, heads)
    if due.dtype != torch.bool or due.stride(1) != 1:
        raise UsageError(
            f"due is {due.dtype} with strides {due.stride()}: bool is needed, a request's beside each other"
        )
