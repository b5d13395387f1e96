"""SpargeAttn's three thresholds, for each query head, and what values they may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.selection.checks import check_probability

THETA, TAU, LAM = 0.6, 0.98, 50.0
"""The defaults of the authors' implementation."""

OFF = float("inf")
"""The lam that skips nothing."""


@dataclass(frozen=True)
class Thresholds:
    """What decides how much is left out, float32 ``[query_heads]`` each.

    Attributes:
        theta: self-similarity above which a block is compressed to its mean; from -1 to 1.
        tau: share of the predicted attention that the kept key blocks hold; in (0, 1], 1 keeps all.
        lam: nats below a row's largest logit so far at which a block's values are skipped; above 0, infinity skips
            nothing.
    """

    theta: Tensor
    tau: Tensor
    lam: Tensor

    @classmethod
    def uniform(
        cls, theta: float, tau: float, lam: float, heads: int, device: torch.device | str
    ) -> Thresholds:
        """The same for every head."""
        return cls(*(torch.full((heads,), value, device=device) for value in (theta, tau, lam)))


def check_thresholds(name: str, theta: float, tau: float, lam: float) -> None:
    """Refuse values out of range.

    Raises:
        UsageError: naming the value and the range.
    """
    if not -1 <= theta <= 1:
        raise UsageError(
            f"{name}: theta={theta} is outside [-1, 1]; it is a cosine similarity, for example theta={THETA}"
        )
    check_probability(name, "tau", tau)
    if not lam > 0:
        raise UsageError(
            f"{name}: lam={lam} is not above 0; it counts nats below the largest logit, for example lam={LAM:g}; "
            "lam=inf skips nothing"
        )
