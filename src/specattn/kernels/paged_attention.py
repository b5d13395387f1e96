"""Decode attention that reads the paged KV pool in place: selected tokens, one list a KV head, or all tokens.

The rows of a round and the query heads of a group share one tile, so each key and value is read once for all of them.
A selected token costs one stretch of ``head_dim`` channels of its key and one of its value, 256 bytes each for 128
channels in bfloat16: whole 32-byte sectors and whole 128-byte lines. That the pool keeps the heads of a token together
and not the tokens of a head therefore costs a list no bytes; it only leaves neighbours in a list apart in memory.

Whatever depends on data is worked out on the device: a launch can be captured in a CUDA graph and replayed with other
lists, lengths and slots. :mod:`specattn.kernels.sparse_attention` is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.device import starts_early
from specattn.kernels.paged_attention_triton import attention_kernel
from specattn.kernels.schedule import Schedule, schedule
from specattn.kernels.tiling import Partition, Workspace
from specattn.selection.base import Selection


def sparse_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    slots: Tensor,
    selection: Selection,
    positions: Tensor,
    scaling: float,
    page_size: int,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Workspace | None = None,
    schedule: Schedule | None = None,
    settled: bool = False,
) -> Tensor:
    """Softmax attention over selected tokens, renormalised over them.

    Args:
        query: ``[batch, rows, query_heads, head_dim]``, the last axis contiguous.
        keys, values: the pool of one layer, ``[pool_rows, kv_heads, head_dim]``, in the query's dtype.
        block_table: int32 ``[slots, pages]``, see :class:`specattn.cache.PagedKVCache`.
        slots: integer ``[batch]``. One that belongs to nobody is harmless: it reads page 0, and its output means
            nothing.
        selection: the tokens; of each list only the first ``counts`` entries are looked at. The lists of several
            heads may be views of the same memory.
        positions: integer ``[batch, rows]``, the rows' token positions. A row sees the selected tokens up to its own;
            one that sees none gives zeros.
        scaling: factor of the logits.
        page_size: tokens a page.
        out: where the result goes, contiguous; made if ``None``.
        lse: where the natural logarithms of the sums go, if they are wanted: float32 ``[batch, rows, query_heads]``,
            contiguous.
        workspace: allocated for this batch and at least as many rows; made, by a launch of its own, if ``None``.
        schedule: this layer's, made with the workspace for lists at least as long; made, by a launch, if ``None``.
        settled: whether the launch before this one writes nothing of what is given but ``query`` and the rows' own keys
            and values. All else is then read while that launch ends, see :mod:`specattn.kernels.early_launch_triton`.

    Returns:
        ``[batch, rows, query_heads, head_dim]``, in the query's dtype; computed in float32.

    Raises:
        UsageError: shapes, dtypes or strides that do not fit together.
    """
    pool = _Pool(keys, values, block_table, slots, page_size)
    lists = _Lists(selection.counts, selection.indices.shape[-1], selection.indices, selection.log_weights)
    return _attend(query, pool, lists, positions, scaling, out, lse, workspace, schedule, settled)


def dense_paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    positions: Tensor,
    scaling: float,
    page_size: int,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Workspace | None = None,
    schedule: Schedule | None = None,
    settled: bool = False,
) -> Tensor:
    """Softmax attention over the first ``lengths`` (int32 ``[batch]``) tokens of each slot, up to a row's own.

    The same kernel, without lists: entry ``i`` is token ``i``. A length of 0 gives zeros. The other arguments, the
    result and the errors are those of :func:`sparse_paged_attention`.
    """
    pool = _Pool(keys, values, block_table, slots, page_size)
    lists = _Lists(lengths[:, None].expand(-1, keys.shape[1]), block_table.shape[1] * page_size)
    return _attend(query, pool, lists, positions, scaling, out, lse, workspace, schedule, settled)


@dataclass(frozen=True)
class _Pool:
    """One layer of the cache, and whose tokens are read."""

    keys: Tensor
    values: Tensor
    block_table: Tensor
    slots: Tensor
    page_size: int

    def check(self, query: Tensor) -> None:
        _, kv_heads, head_dim = self.keys.shape
        if query.shape[2] % kv_heads or query.shape[3] != head_dim:
            raise UsageError(
                f"a query of {query.shape[2]} heads of {query.shape[3]} channels does not fit a cache of {kv_heads} "
                f"KV heads of {head_dim}: the heads must be a multiple of its heads, the channels the same"
            )
        if not query.dtype == self.keys.dtype == self.values.dtype:
            raise UsageError(
                f"the query is {query.dtype}, keys are {self.keys.dtype} and values {self.values.dtype}: "
                "convert the query to the dtype of the cache"
            )
        layouts = [(part.shape, part.stride()) for part in (self.keys, self.values)]
        if layouts[0] != layouts[1] or self.keys.stride(2) != 1 or query.stride(3) != 1:
            raise UsageError(
                f"keys and values have shapes and strides {layouts}, the query strides {query.stride()}: "
                "keys and values must be alike, and the channels of all contiguous"
            )


@dataclass(frozen=True)
class _Lists:
    """Which tokens are read: those of a selection, or as many as ``counts`` says from the first on."""

    counts: Tensor
    capacity: int
    indices: Tensor | None = None
    log_weights: Tensor | None = None

    def check(self) -> None:
        wanted = (*self.counts.shape, self.capacity)
        for name, part in (("indices", self.indices), ("log_weights", self.log_weights)):
            if part is not None and (tuple(part.shape) != wanted or part.stride(2) != 1):
                raise UsageError(
                    f"the selection's {name} have shape {list(part.shape)} and strides {part.stride()}: "
                    f"{list(wanted)} is needed, each list contiguous"
                )

    def strides(self) -> tuple[int, ...]:
        """Of counts, indices and log-weights: from request to request and from head to head."""
        parts = (self.counts, self.indices, self.log_weights)
        return tuple(part.stride(axis) if part is not None else 0 for part in parts for axis in (0, 1))


def _attend(
    query: Tensor,
    pool: _Pool,
    lists: _Lists,
    positions: Tensor,
    scaling: float,
    out: Tensor | None,
    lse: Tensor | None,
    workspace: Workspace | None,
    plan: Schedule | None,
    settled: bool,
) -> Tensor:
    """Check, make what was not given, launch."""
    batch, rows, query_heads, head_dim = query.shape
    kv_heads = pool.keys.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    pool.check(query)
    lists.check()
    _check_shape("slots", pool.slots, (batch,))
    if not pool.slots.is_contiguous():
        raise UsageError(f"slots have a stride of {pool.slots.stride(0)}: they must be contiguous")
    _check_shape("positions", positions, (batch, rows))
    _check_shape("counts", lists.counts, (batch, kv_heads))
    _check_shape("out", out, query.shape)
    if lse is not None:
        _check_shape("lse", lse, query.shape[:3])
    if workspace is None:
        workspace = Workspace.allocate(
            batch=batch,
            rows=rows,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=query.dtype,
            device=query.device,
        )
    # Otherwise the launch before is one of these.
    settled = settled and plan is not None and positions.is_contiguous() and starts_early(query.device)
    if plan is None:
        plan = schedule(lists.counts[:, None], workspace, listed=lists.indices is not None).of_layer(0)
    _check_cut(plan.cut, batch, rows, query_heads, kv_heads, head_dim)
    _launch(plan, query, pool, lists, positions.contiguous(), scaling, out, lse, workspace, settled)
    return out


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UsageError(f"{name} has shape {list(tensor.shape)}: {list(shape)} is needed")


def _check_cut(cut: Partition, batch: int, rows: int, query_heads: int, kv_heads: int, head_dim: int) -> None:
    needed, held = rows * (query_heads // kv_heads), cut.blocks * cut.block_m
    if batch * kv_heads * cut.blocks != cut.units or needed > held or head_dim > cut.block_d:
        raise UsageError(
            f"{batch} x {kv_heads} lists met by {needed} query rows of {head_dim} channels do not fit a workspace for "
            f"{cut.units // cut.blocks} lists, {held} rows and {cut.block_d} channels: allocate one for these shapes"
        )


def _launch(
    plan: Schedule,
    query: Tensor,
    pool: _Pool,
    lists: _Lists,
    positions: Tensor,
    scaling: float,
    out: Tensor,
    lse: Tensor | None,
    workspace: Workspace,
    settled: bool,
) -> None:
    _, rows, query_heads, head_dim = query.shape
    kv_heads = pool.keys.shape[1]
    group = query_heads // kv_heads
    cut = plan.cut
    partials, lses = workspace.views(cut)
    tiles = max(1, -(-lists.capacity // cut.tiling.tokens))  # of a list, at most
    early = starts_early(query.device)
    attention_kernel[(min(cut.programs, cut.units * tiles),)](
        query,
        pool.keys,
        pool.values,
        pool.block_table,
        pool.slots,
        positions,
        lists.counts,
        lists.indices,
        lists.log_weights,
        out,
        lse,
        plan.stretches,
        partials,
        lses,
        workspace.arrivals,
        scaling,
        rows,
        kv_heads,
        *query.stride()[:3],
        *pool.keys.stride()[:2],
        pool.block_table.stride(0),
        *lists.strides(),
        lists.capacity,
        GROUP=group,
        BLOCKS=cut.blocks,
        PAGE=pool.page_size,
        HEAD_DIM=head_dim,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.tiling.tokens,
        BLOCK_D=cut.block_d,
        PARTS=cut.parts_at_once,
        EARLY=early,
        SETTLED=settled,
        num_warps=cut.tiling.warps,
        num_stages=cut.tiling.stages,
        **({"launch_pdl": True} if early else {}),
    )
