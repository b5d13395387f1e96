"""Synthetic rounds: peaked attention with a sink, in half precision as calibration keeps it."""

import torch
from torch import Tensor

from specattn.mapping.samples import Geometry, RoundSample, normalised

GEOMETRY = Geometry(target_layers=3, query_heads=6, kv_heads=2, draft_layers=2, draft_heads=3)


def attention(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """``[rows, length]``: random distributions, some of whose mass lies on the first token."""
    logits = 3 * torch.randn(rows, length, generator=generator)
    logits[:, 0] += 4
    return logits.softmax(-1)


def random_rounds(count: int = 4, geometry: Geometry = GEOMETRY, seed: int = 0) -> list[RoundSample]:
    """Rounds of ragged lengths whose targets have little to do with the draft."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [20 + 7 * number for number in range(count)]
    return [
        RoundSample(
            attention(geometry.target_layers * geometry.query_heads, length, generator).bfloat16(),
            attention(geometry.draft_rows, length, generator).bfloat16(),
        )
        for length in lengths
    ]


def mixed_rounds(weights: Tensor, power: float = 1.0, alike: float = 0.0) -> list[RoundSample]:
    """Four rounds whose targets are ``weights @ draft``, sharpened if ``power`` is above one; in float32.

    ``alike`` is the part of their attention that all draft heads share: it makes plain EM slow.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(4):
        shared = attention(1, 96, generator)
        draft = (1 - alike) * attention(weights.shape[1], 96, generator) + alike * shared
        samples.append(RoundSample(normalised((weights @ draft) ** power), draft))
    return samples
