"""How far the next-token distributions of one method on one document are from the dense ones, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specattn.evaluation.attention_mass import Breakdown


@dataclass(frozen=True)
class Detail:
    """What lies behind the means of a result.

    Attributes:
        kl: of each round, the mean over its rows.
        nll_change: of each round, how much the mean negative log-likelihood is above the dense model's, nats.
        breakdown: attention mass and density by layer and KV head.
    """

    kl: tuple[float, ...]
    nll_change: tuple[float, ...]
    breakdown: Breakdown


@dataclass(frozen=True)
class FidelityResult:
    """One method on one document. Means over the evaluated rows.

    Attributes:
        kl: KL(dense || sparse) of the next-token distributions, nats a token.
        total_variation: half the L1 distance of the distributions; a rejection step by the dense target would
            accept one minus this share of the tokens.
        top1_agreement: share of rows with the same most likely token.
        perplexity, perplexity_dense: of the text's own next tokens.
        attention_mass: share of the dense attention mass that the selected tokens hold, over sparse layers.
        kv_read_fraction, draft_read_fraction: see :func:`specattn.accounting.read_fractions`.
        prefill: how the target read the context before the rows.
        prefill_computed: share of the causal query-key products that it computed to do so.
        detail: what lies behind the means.
    """

    method: str
    options: dict[str, object]
    document: str
    kl: float
    total_variation: float
    top1_agreement: float
    perplexity: float
    perplexity_dense: float
    attention_mass: float
    kv_read_fraction: float
    draft_read_fraction: float
    prefill: str = "dense"
    prefill_computed: float = 1.0
    detail: Detail | None = field(default=None, repr=False)


def row_sums(dense: Tensor, sparse: Tensor, following: Tensor) -> Tensor:
    """Sums over rows of text: KL, total variation, agreement, and the negative log likelihoods, sparse and dense.

    Args:
        dense, sparse: logits ``[rows, vocab]``.
        following: the tokens that follow in the text, ``[rows]``.

    Returns:
        The five sums, float64.
    """
    # In float32 the rounding of the logarithms alone may make a divergence negative.
    dense, sparse = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    return torch.stack(
        [
            (dense.exp() * (dense - sparse)).sum(),
            (dense.exp() - sparse.exp()).abs().sum() / 2,
            (dense.argmax(-1) == sparse.argmax(-1)).sum(),
            -sparse.gather(1, following[:, None]).sum(),
            -dense.gather(1, following[:, None]).sum(),
        ]
    )
