"""What the tests of promises share: inputs of many shapes, and verdicts on failure rates.

Every KV head of a round holds the same tokens and draws its own sample, so one round is a few hundred trials. Rates are
judged by exact binomial tails, as in the interval of Clopper and Pearson.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TOKENS, CHANNELS, HEADS, LAYERS = 1200, 8, 150, 4
TRIALS = HEADS * LAYERS
SURE = 1e-4  # probability of a wrong verdict


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens]`` of the only query, and values ``[tokens, channels]``."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(TOKENS, generator=generator)
    noise = torch.randn(TOKENS, CHANNELS, generator=generator)
    sign = torch.where(torch.rand(TOKENS, generator=generator) < 0.5, 1.0, -1.0)[:, None]
    rare = (torch.rand(TOKENS, generator=generator) < 0.06)[:, None]
    cases: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "flat": lambda: (0.3 * z, 1 + 0.5 * noise),
        "lognormal": lambda: (1.5 * z, 0.5 + noise),
        "power law": lambda: (-0.4 * torch.rand(TOKENS, generator=generator).log(), 0.5 + noise),
        "values that cancel": lambda: (0.7 * z, sign + 0.3 + 0.3 * noise),
        "values around nothing": lambda: (0.7 * z, 0.1 + noise),
        "values against weights": lambda: (0.8 * z, (-0.8 * z).exp()[:, None] * (1 + 0.1 * noise)),
        "values with weights": lambda: (0.3 * z, z.exp()[:, None] * (1 + 0.1 * noise)),
        "a few huge values": lambda: (0.5 * z, (1 + 0.3 * noise) * torch.where(rare, 8.0, 1.0)),
    }
    return cases[name]()


def at_most(count: int, p: float, trials: int = TRIALS) -> float:
    """Probability of ``count`` failures or fewer if each trial fails with probability ``p``."""
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(p)
        + (trials - k) * math.log1p(-p)
        for k in range(count + 1)
    )
    return math.fsum(map(math.exp, logs))


def surely_below(count: int, p: float) -> bool:
    """Whether the upper confidence bound of the failure rate is below ``p``."""
    return at_most(count, p) < SURE


def surely_above(count: int, p: float) -> bool:
    """Whether the lower confidence bound of the failure rate is above ``p``."""
    return 1 - at_most(count - 1, p) < SURE
