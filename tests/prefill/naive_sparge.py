"""SpargeAttn as its paper reads, with loops: for comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

QUERY_BLOCK, KEY_BLOCK = 128, 64


def blocks_of(tokens: Tensor, size: int) -> list[Tensor]:
    """``[n, d]`` cut into blocks, the last one as long as it is."""
    return list(tokens.double().split(size))


def self_similarity(block: Tensor) -> float:
    """Mean cosine similarity over all pairs of a block's tokens."""
    return float(cosine_similarity(block[:, None], block[None], dim=-1).mean())


def top_cdf(weights: Tensor, tau: float) -> set[int]:
    """The heaviest entries until their sum reaches ``tau`` of the total."""
    chosen, mass = set(), 0.0
    for index in sorted(range(len(weights)), key=lambda i: -float(weights[i])):
        if mass >= tau * float(weights.sum()):
            break
        chosen.add(index)
        mass += float(weights[index])
    return chosen


def block_mask(
    query: Tensor, key: Tensor, start: int | None, theta: float, tau: float, scaling: float
) -> Tensor:
    """bool ``[query_blocks, key_blocks]`` for one head: ``query`` ``[rows, d]``, ``key`` ``[length, d]``."""
    queries, keys = blocks_of(query, QUERY_BLOCK), blocks_of(key, KEY_BLOCK)
    alike = [self_similarity(block) > theta for block in keys]
    mask = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for i, rows in enumerate(queries):
        first = (start or 0) + i * QUERY_BLOCK
        last = first + len(rows) - 1
        visible = [j for j in range(len(keys)) if start is None or j * KEY_BLOCK <= last]
        if self_similarity(rows) > theta:
            candidates = [j for j in visible if alike[j]]
            scores = [float(rows.mean(0) @ keys[j].mean(0)) * scaling for j in candidates]
            chosen = (
                top_cdf(torch.tensor(scores, dtype=torch.float64).softmax(0), tau) if candidates else set()
            )
            kept = {candidates[c] for c in chosen} | {j for j in visible if not alike[j]}
        else:
            kept = set(visible)
        if start is not None:
            kept |= {j for j in visible if (j + 1) * KEY_BLOCK > first}  # a row's own token
        mask[i, sorted(kept)] = True
    return mask


def example(
    rows: int, length: int, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 64, *, rough: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[1, query_heads, rows, d]``, keys and values ``[1, kv_heads, length, d]`` with blocks of all kinds.

    Keys and queries are slow waves with noise of strength ``rough``; some stretches of both are noise alone, so that
    neither can be compressed there.
    """
    generator = torch.Generator().manual_seed(length + rows)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    period = 400 * (1 + 4 * torch.rand(kv_heads, 1, head_dim, generator=generator))
    key = 1.4 * torch.sin(6.28 * torch.arange(length)[:, None] / period + 6.28 * noise(kv_heads, 1, head_dim))
    query = key.repeat_interleave(query_heads // kv_heads, 0)[:, length - rows :] + rough * noise(
        query_heads, rows, head_dim
    )
    key = key + rough * noise(kv_heads, length, head_dim)
    wild = key[:, length // 3 : length // 3 + 70]
    wild.copy_(noise(*wild.shape))
    query[:1, :60] = noise(*query[:1, :60].shape)
    return query[None], key[None], noise(1, kv_heads, length, head_dim)
