"""The second phase of the draft's sparse attention: the values of chosen tokens, weighted by known scores.

The weights are the softmax of the first phase's logits over the chosen tokens, so no key is read again.
"""

from __future__ import annotations

from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_shape
from specattn.kernels.split_kv import SplitWorkspace, check_decode, tile_tokens


def value_attention(
    logits: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    batch: PagedBatch,
    *,
    out: Tensor,
    workspace: SplitWorkspace,
) -> Tensor:
    """Values of the tokens in ``indices``, weighted by the softmax of their ``logits`` over the list.

    Args:
        logits: contiguous ``[batch, rows, query_heads, length]`` from
            :func:`specattn.kernels.quantised_scores.quantised_scores`, minus infinity where a row does not see.
        values: the layer's pool, ``[pool_rows, kv_heads, head_dim]``.
        indices: int32 ``[batch, kv_heads, capacity]``, token positions below ``lengths``; one list for all rows
            and heads of a group.
        counts: int32 ``[batch, kv_heads]``, contiguous: how many entries of a list are valid. A row whose list
            holds nothing that it sees becomes 0.
        batch: where the tokens lie; its lengths are not read.
        out: ``[batch, rows, query_heads, head_dim]``, contiguous.
        workspace: allocated for at least this batch and these rows.

    Returns:
        ``out``.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.value_attention_triton import value_attention_kernel

    _, rows, query_heads, head_dim = out.shape
    kv_heads = values.shape[1]
    block = check_decode(out, kv_heads, batch, workspace)
    _check(logits, values, indices, counts, out)
    grid = (kv_heads, workspace.splits, len(batch))
    value_attention_kernel[grid](
        logits,
        values,
        indices,
        counts,
        batch.block_table,
        batch.slots,
        out,
        workspace.outputs,
        workspace.lse,
        workspace.arrivals,
        logits.shape[-1],
        indices.stride(0),
        indices.stride(1),
        values.stride(0),
        batch.block_table.stride(0),
        ROWS=rows,
        GROUP=query_heads // kv_heads,
        D=head_dim,
        PAGE=batch.page_size,
        BLOCK_M=block,
        BLOCK_N=tile_tokens(head_dim, values.dtype),
        BLOCK_S=1 << (workspace.splits - 1).bit_length(),
        STAGES=stages(block),
        num_warps=8 if block > 32 else 4,
    )
    return out


def stages(block: int) -> int:
    """Tiles on their way; with many rows the weights take the room of half of them."""
    return 8 if block <= 64 else 4


def value_attention_reference(
    logits: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    batch: PagedBatch,
    *,
    out: Tensor,
    workspace: SplitWorkspace | None = None,
) -> Tensor:
    """The same in float32 PyTorch, list by list; needs no workspace."""
    _check(logits, values, indices, counts, out)
    _, kv_heads, _ = values.shape
    group = out.shape[2] // kv_heads
    for request in range(len(batch)):
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            chosen = indices[request, head, : int(counts[request, head])].long()
            weights = logits[request, :, heads][..., chosen].float().softmax(-1).nan_to_num(0)
            read = values[batch.rows(request, chosen), head].float()
            out[request, :, heads] = (weights @ read).to(out.dtype)
    return out


def _check(logits: Tensor, values: Tensor, indices: Tensor, counts: Tensor, out: Tensor) -> None:
    requests, rows, query_heads, head_dim = out.shape
    kv_heads = values.shape[1]
    check_shape("values", values, None, kv_heads, head_dim)
    check_shape("logits", logits, requests, rows, query_heads, None)
    check_shape("indices", indices, requests, kv_heads, None)
    check_shape("counts", counts, requests, kv_heads)
    tensors = {"logits": logits, "values": values, "counts": counts, "out": out}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise UsageError(f"{name} must be contiguous")
