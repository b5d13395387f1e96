"""A decoding batch in a scattered pool where everything that must not be read is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.kernels.paged import PagedBatch
from specattn.kernels.score_export import ScoreExport, export_places
from specattn.kernels.split_kv import SplitWorkspace

NAN = float("nan")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter has no products of bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# rows, query heads, KV heads, channels: groups of 1, 3, 6, 7 and 8
SHAPES = [
    (1, 2, 2, 64),
    (2, 6, 2, 128),
    (1, 6, 1, 256),
    (2, 14, 2, 64),
    (9, 8, 1, 32),
    (5, 16, 2, 64),
]


@dataclass(frozen=True)
class DraftCase:
    """Arguments of the draft's kernels; ``clean_keys`` and ``clean_values`` are each request's, in token order."""

    query: Tensor
    keys: Tensor
    values: Tensor
    batch: PagedBatch
    lengths: list[int]
    clean_keys: list[Tensor]
    clean_values: list[Tensor]

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    def out(self) -> Tensor:
        return torch.full_like(self.query, NAN)

    def workspace(self, splits: int = 4) -> SplitWorkspace:
        """Poisoned but for the counts, which a workspace promises to hold at 0."""
        _, kv_heads, head_dim = self.keys.shape
        workspace = SplitWorkspace.allocate(
            batch=len(self.lengths),
            rows=self.query.shape[1],
            query_heads=self.heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            length=max(self.lengths),
            device=DEVICE,
            splits=splits,
        )
        workspace.outputs.fill_(NAN)
        workspace.lse.fill_(NAN)
        return workspace

    def export(self, dtype: torch.dtype = torch.float32, slack: int = 16) -> ScoreExport:
        """Every third head, and the last, at places 1, 2, ... of a poisoned buffer with two places to spare."""
        heads = sorted({*range(0, self.heads, 3), self.heads - 1})
        places = export_places(torch.tensor(heads, device=DEVICE), 1, self.heads)[0]
        length = -(-max(self.lengths) // 16) * 16 + slack
        shape = (len(self.lengths), len(heads) + 2)
        return ScoreExport(
            torch.where(places >= 0, places + 1, -1),
            torch.full((*shape, length), NAN, dtype=dtype, device=DEVICE),
            torch.full(shape, NAN, device=DEVICE),
        )

    def scores(self, dtype: torch.dtype = torch.float32, slack: int = 16) -> tuple[Tensor, Tensor]:
        """Poisoned buffers for the logits and log-sum-exps of all heads."""
        length = -(-max(self.lengths) // 16) * 16 + slack
        shape = self.query.shape[:3]
        return (
            torch.full((*shape, length), NAN, dtype=dtype, device=DEVICE),
            torch.full(shape, NAN, device=DEVICE),
        )


def draft_case(
    lengths: list[int],
    *,
    rows: int = 2,
    query_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    seed: int = 0,
) -> DraftCase:
    """Requests of ``lengths`` tokens, the last ``rows`` of them this step's; a length of 0 is padding of the batch.

    ``offset`` is added to every key, as the biases of some models do.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(counts), generator=generator).int() + 1
    slots = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    table = torch.zeros(len(lengths) + 2, max(counts) + 2, dtype=torch.int32)
    pool_rows = (sum(counts) + 2) * page_size
    keys, values = (torch.full((pool_rows, kv_heads, head_dim), NAN, dtype=dtype) for _ in "kv")
    clean_keys, clean_values = [], []
    for slot, length, own in zip(slots.tolist(), lengths, pages.split(counts), strict=True):
        table[slot, : len(own)] = own
        key, value = torch.randn(2, length, kv_heads, head_dim, generator=generator)
        key, value = (key + offset).to(dtype), value.to(dtype)
        token = torch.arange(length)
        at = own.long()[token // page_size] * page_size + token % page_size
        keys[at], values[at] = key, value
        clean_keys.append(key.to(DEVICE))
        clean_values.append(value.to(DEVICE))
    query = torch.randn(len(lengths), rows, query_heads, head_dim, generator=generator)
    batch = PagedBatch(
        table.to(DEVICE),
        slots.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_size,
    )
    return DraftCase(
        query.to(DEVICE, dtype),
        keys.to(DEVICE),
        values.to(DEVICE),
        batch,
        lengths,
        clean_keys,
        clean_values,
    )
