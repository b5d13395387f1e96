"""The first phase of the draft's sparse attention: scores of all heads, from the quantised keys alone.

The second, :mod:`specattn.kernels.value_attention`, reads the values of the few tokens that the scores choose. Of the
512 bytes that Qwen2.5-0.5B keeps of a token in a layer, dense attention reads all; of 4 bits a channel the first phase
reads 72, and the second 256 of each chosen token: .22 in all where 15 % are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.paged import PagedBatch, check_shape
from specattn.kernels.quantised_keys import QuantisedKeys
from specattn.kernels.score_export import ScoreExport, export_reference, relative_logits
from specattn.kernels.split_kv import SplitWorkspace, check_decode, tile_tokens


def quantised_scores(
    query: Tensor,
    copy: QuantisedKeys,
    batch: PagedBatch,
    scaling: float,
    *,
    logits: Tensor,
    lse: Tensor,
    workspace: SplitWorkspace,
    export: ScoreExport | None = None,
) -> None:
    """Logits of a request's last rows over the quantised keys, their own included, which were appended before.

    A code is an integer that bfloat16 and float16 hold exactly. So the products with codes go to the tensor cores,
    and scale and zero are applied to a token's logit instead of to its channels:
    ``q . key = scale * (q . codes) + zero * sum(q)``. The result is that of the dequantised keys.

    Logits and ``lse`` are relative to the own token's logit (:mod:`specattn.kernels.score_export` says why).

    Args:
        query: ``[batch, rows, query_heads, head_dim]``.
        copy: the layer's quantised keys.
        batch: where the tokens lie. Row ``r`` sees ``lengths - rows + 1 + r`` of them.
        scaling: factor of the logits.
        logits: ``[batch, rows, query_heads, length]``, contiguous, float16 (or float32, bfloat16). Written up
            to ``lengths``, with minus infinity where a row does not see; what lies beyond is left as it is. A
            length that is a multiple of 16 makes stores wide.
        lse: contiguous float32 ``[batch, rows, query_heads]``; minus infinity of rows that see nothing.
        workspace: allocated for at least this batch and these rows.
        export: where the scores of the last row go as well, for the target's selection.

    Raises:
        UsageError: shapes that do not fit together, or that the kernel cannot take.
    """
    from specattn.kernels.quantised_scores_triton import quantised_scores_kernel

    _, rows, query_heads, head_dim = query.shape
    kv_heads = copy.codes.shape[0]
    block = check_decode(query, kv_heads, batch, workspace)
    check_shape("codes", copy.codes, kv_heads, None, head_dim * copy.bits // 8)
    check_scores(logits, lse, query)
    if export is not None:
        export.check(len(batch), query_heads)
    grid = (kv_heads, workspace.splits, len(batch))
    quantised_scores_kernel[grid](
        query,
        copy.codes,
        copy.ranges.view(torch.int32),
        batch.block_table,
        batch.slots,
        batch.lengths,
        logits,
        lse,
        workspace.lse,
        workspace.arrivals,
        export and export.places,
        export and export.logits,
        export and export.lse,
        scaling,
        logits.shape[-1],
        export.logits.shape[-1] if export else 0,
        copy.codes.shape[1],
        query.stride(0),
        query.stride(1),
        query.stride(2),
        batch.block_table.stride(0),
        export.logits.stride(0) if export else 0,
        export.logits.stride(1) if export else 0,
        export.lse.stride(0) if export else 0,
        ROWS=rows,
        GROUP=query_heads // kv_heads,
        D=head_dim,
        BITS=copy.bits,
        PAGE=batch.page_size,
        BLOCK_M=block,
        BLOCK_N=min(128, 2 * tile_tokens(head_dim, query.dtype)),
        BLOCK_S=1 << (workspace.splits - 1).bit_length(),
        STAGES=5,
        num_warps=8 if block > 32 else 4,
    )


def check_scores(logits: Tensor, lse: Tensor, query: Tensor) -> None:
    """Refuse buffers that do not hold the scores of ``query``.

    Raises:
        UsageError: naming the shapes.
    """
    batch, rows, heads, _ = query.shape
    check_shape("logits", logits, batch, rows, heads, None)
    check_shape("lse", lse, batch, rows, heads)
    if not (logits.is_contiguous() and lse.is_contiguous()):
        raise UsageError("logits and lse must be contiguous; make views of a flat buffer for fewer rows")


def quantised_scores_reference(
    query: Tensor,
    copy: QuantisedKeys,
    batch: PagedBatch,
    scaling: float,
    *,
    logits: Tensor,
    lse: Tensor,
    workspace: SplitWorkspace | None = None,
    export: ScoreExport | None = None,
) -> None:
    """The same in float32 PyTorch, request by request; needs no workspace."""
    check_scores(logits, lse, query)
    for request in range(len(batch)):
        rows = batch.visible_rows(request)
        scores = relative_logits(query[request], copy.dequantise(rows), scaling)
        logits[request, ..., : len(rows)] = scores.to(logits.dtype)
        lse[request] = scores.logsumexp(-1)
        if export is not None:
            export_reference(export, request, scores[-1])
