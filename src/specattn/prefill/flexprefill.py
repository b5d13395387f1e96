"""FlexPrefill (arXiv 2502.20766): the text decides which pattern each head has and how much of it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from specattn.kernels.blocks import BlockGrid
from specattn.kernels.nucleus import nucleus, top_k
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.dense import Dense
from specattn.prefill.lines import last_rows
from specattn.prefill.patterns import BlockPattern, block_grid, causal_products, computed_share, kv_heads
from specattn.prefill.pooled import block_means, pooled_attention
from specattn.selection.checks import check_at_least, check_probability


@dataclass(frozen=True)
class FlexPrefill(PrefillMethod):
    """Vertical-slash or query-aware blocks, as many as hold ``gamma`` of the attention that was estimated.

    Attributes:
        gamma: share of the estimated attention that is computed; 1 computes everything.
        tau: a head is query-aware if pooled blocks predict the last queries' attention up to this
            Jensen-Shannon distance; 0 makes no head so.
        block: positions a block of queries and keys.
        min_budget: least tokens of vertical and of slash blocks. A context of no more, or of two blocks, is read
            densely.
    """

    name: ClassVar[str] = "flexprefill"

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    min_budget: int = 1024

    def __post_init__(self) -> None:
        check_probability(self.name, "gamma", self.gamma)
        check_at_least(self.name, "tau", self.tau, 0)
        check_at_least(self.name, "block", self.block, 1)
        check_at_least(self.name, "min_budget", self.min_budget, 0)

    @property
    def min_blocks(self) -> int:
        """``min_budget`` in blocks, at least one."""
        return max(1, -(-self.min_budget // self.block))

    def attention(self, call: PrefillCall) -> PrefillOutput:
        if self.gamma >= 1 or len(call.key) <= self.block * max(2, self.min_blocks):
            return Dense().attention(call)
        heads = call.query.shape[1]
        pattern, _ = self.pattern(call)
        products = pattern.products(call).sum() + heads * self.estimation(call)
        return PrefillOutput(pattern.attention(call, range(heads)), computed_share(call, products))

    def pattern(self, call: PrefillCall) -> tuple[BlockPattern, Tensor]:
        """What the blocks of all heads read, and which heads are query-aware, bool ``[heads]``."""
        grid = block_grid(call, self.block)
        vertical, slash = block_scores(call, grid)
        query_aware = jensen_shannon(pooled_last_rows(call, self.block), vertical) < self.tau
        pooled = pooled_attention(call, range(call.query.shape[1]), grid).transpose(0, 1)
        aware = nucleus(pooled.flatten(1)[None], self.gamma, _length(pooled.flatten(1)))[0].view_as(pooled)
        chosen = self._lines(grid, vertical, slash, query_aware) | (aware & query_aware[:, None, None])
        return BlockPattern.of(grid, chosen), query_aware

    def _lines(self, grid: BlockGrid, vertical: Tensor, slash: Tensor, query_aware: Tensor) -> Tensor:
        """Vertical and slash blocks, ``[heads, query_blocks, key_blocks]``: the fewest in query-aware heads."""
        share = self.gamma * (~query_aware).double()[None]
        verticals, slashes = (self._heaviest(scores[None], share)[0] for scores in (vertical, slash))
        tiles = [slashes[:, each.clamp(min=0)] & (each >= 0) for each in _distances(grid, slash.device)]
        return verticals[:, None] | tiles[0] | tiles[1]

    def _heaviest(self, scores: Tensor, share: Tensor) -> Tensor:
        """The first block, and the heaviest that hold ``share`` of the scores, or the fewest allowed."""
        lengths = _length(scores)
        return nucleus(scores, share, lengths, sink=1) | top_k(scores, self.min_blocks, lengths, sink=1)

    def estimation(self, call: PrefillCall) -> int:
        """Products that finding a head's pattern takes: the last queries, their mean, and all pooled blocks."""
        grid, rows = block_grid(call, self.block), min(self.block, len(call.query))
        return causal_products(len(call.key) - rows, rows) + grid.key_blocks * (1 + grid.query_blocks)


def block_scores(call: PrefillCall, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """Mean attention of the last queries, a block of them, by key block and by distance in blocks.

    Returns:
        two float32 ``[heads, key_blocks]``.
    """
    block, length = grid.key_block, grid.length
    rows = min(block, grid.rows)
    own = torch.arange(length - rows, length, device=call.query.device) // block
    distance = (own[:, None] - torch.arange(grid.key_blocks, device=own.device)).clamp(min=0)
    vertical, slash = [], []
    for head in range(call.query.shape[1]):
        mass = pad(last_rows(call, head, rows), (0, -length % block)).unflatten(1, (-1, block)).sum(-1)
        vertical.append(mass.mean(0))
        # The future, at distances below 0, has no mass.
        slash.append(mass.new_zeros(grid.key_blocks).index_add_(0, distance.flatten(), mass.flatten()) / rows)
    return torch.stack(vertical), torch.stack(slash)


def pooled_last_rows(call: PrefillCall, block: int) -> Tensor:
    """Attention of the mean of the last ``block`` queries over mean-pooled keys: float32 ``[heads, blocks]``."""
    query = call.query[-block:].float().mean(0)
    keys = block_means(call.key, block)[kv_heads(call)]
    return (torch.einsum("hd,hkd->hk", query, keys) * call.scaling).softmax(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon distance, the root of the divergence in nats, of distributions ``[..., n]``."""
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)  # 0 log 0 is 0
    divergence = sum(torch.xlogy(side, side / middle).sum(-1) for side in (p, q))
    return torch.as_tensor(divergence).div(2).clamp(min=0).sqrt()


def _distances(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks from a key block to those of a query block's first and last row: two ``[query_blocks, key_blocks]``.

    They differ where the chunk does not begin with a block. Negative in the future.
    """
    assert grid.start is not None
    first = grid.start + torch.arange(grid.query_blocks, device=device) * grid.query_block
    last = grid.visible(device) - 1
    key_block = torch.arange(grid.key_blocks, device=device)
    return (first // grid.key_block)[:, None] - key_block, last[:, None] - key_block


def _length(scores: Tensor) -> Tensor:
    return torch.tensor([scores.shape[-1]], device=scores.device)
