"""Dense decode attention of the draft, which also exports the scores of chosen heads from the same pass.

The first step of a round feeds two tokens and later ones one; up to nine rows are taken. The heads of a group lie
beside each other in one tile, so that each key and value is read once; exporting adds two bytes a token and exported
head, 1 % of the bytes of the pass where Qwen2.5-0.5B exports a fifth of its heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_shape
from specattn.kernels.score_export import ScoreExport, export_reference, relative_logits
from specattn.kernels.split_kv import SplitWorkspace, check_decode, tile_tokens


def export_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    scaling: float,
    *,
    out: Tensor,
    workspace: SplitWorkspace,
    export: ScoreExport | None = None,
) -> Tensor:
    """Attention of a request's last rows over all that it has cached; their own keys and values are in the pool.

    One launch, without a question to the device: it can be captured in a CUDA graph and replayed with other
    lengths.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.
        keys, values: the layer's pool, ``[pool_rows, kv_heads, head_dim]``.
        batch: where the tokens lie. Row ``r`` sees ``lengths - rows + 1 + r`` of them.
        scaling: factor of the logits.
        out: ``[batch, rows, query_heads, head_dim]``, contiguous; rows that see nothing become 0.
        workspace: allocated for at least this batch and these rows.
        export: where the scores of the last row go, if they are wanted.

    Returns:
        ``out``.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.export_attention_triton import export_attention_kernel

    _, rows, query_heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    block = check_decode(query, kv_heads, batch, workspace)
    check_pool(keys, values, kv_heads, head_dim)
    check_shape("out", out, *query.shape)
    if export is not None:
        export.check(len(batch), query_heads)
    # Keys and values on their way take twice the shared memory of the other kernels: half as many programs fit.
    splits = max(1, workspace.splits // 2)
    grid = (kv_heads, splits, len(batch))
    export_attention_kernel[grid](
        query,
        keys,
        values,
        batch.block_table,
        batch.slots,
        batch.lengths,
        out,
        workspace.outputs,
        workspace.lse,
        workspace.arrivals,
        export and export.places,
        export and export.logits,
        export and export.lse,
        scaling,
        export.logits.shape[-1] if export else 0,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        keys.stride(0),
        batch.block_table.stride(0),
        export.logits.stride(0) if export else 0,
        export.logits.stride(1) if export else 0,
        export.lse.stride(0) if export else 0,
        ROWS=rows,
        GROUP=query_heads // kv_heads,
        D=head_dim,
        PAGE=batch.page_size,
        BLOCK_M=block,
        BLOCK_N=tile_tokens(head_dim, keys.dtype),
        BLOCK_S=1 << (splits - 1).bit_length(),
        num_warps=8 if block > 32 else 4,
        num_stages=5 if block <= 32 else 3,
    )
    return out


def check_pool(keys: Tensor, values: Tensor, kv_heads: int, head_dim: int) -> None:
    """Refuse keys and values that are no pool of a cache.

    Raises:
        UsageError: naming the shapes.
    """
    check_shape("keys", keys, None, kv_heads, head_dim)
    check_shape("values", values, keys.shape[0], kv_heads, head_dim)
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise UsageError("keys and values must be contiguous pools; pass the cache's own tensors")


def export_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    scaling: float,
    *,
    out: Tensor,
    workspace: SplitWorkspace | None = None,
    export: ScoreExport | None = None,
) -> Tensor:
    """The same in float32 PyTorch, request by request; needs no workspace."""
    group = query.shape[2] // keys.shape[1]
    for request in range(len(batch)):
        rows = batch.visible_rows(request)
        logits = relative_logits(query[request], keys[rows], scaling)
        weights = logits.softmax(-1).nan_to_num(0)  # NaN: the rows that see nothing
        spread = values[rows].float().repeat_interleave(group, 1)
        out[request] = torch.einsum("rhn,nhd->rhd", weights, spread).to(out.dtype)
        if export is not None:
            export_reference(export, request, logits[-1])
    return out
