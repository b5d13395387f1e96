"""Speculative acceptance: which draft tokens stand, and which token follows, in the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.sampling import sample


@dataclass(frozen=True)
class Verdict:
    """What a round yields for each request: ``accepted`` draft tokens, then ``next_token``.

    Attributes:
        accepted: int64 ``[batch]``, 0 to gamma; stays on the device.
        next_token: int64 ``[batch]``, drawn by the target: a correction, or a bonus when all were accepted.
    """

    accepted: Tensor
    next_token: Tensor


def verify(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, u_accept: Tensor, u_next: Tensor
) -> Verdict:
    """Accept or correct a round's draft tokens (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

    Token i is accepted with probability min(1, p/q). After the first rejection the next token is drawn from
    the normalised max(p - q, 0), after none from the target's last row. Greedy decoding is the case of
    one-hot rows.

    Args:
        draft_tokens: int64 ``[batch, gamma]``, drawn from ``draft_probs``.
        draft_probs: q, ``[batch, gamma, vocabulary]``.
        target_probs: p, ``[batch, gamma + 1, vocabulary]``; row i is the distribution of draft token i.
        u_accept: ``[batch, gamma]`` in [0, 1).
        u_next: ``[batch]`` in [0, 1), independent of ``u_accept``.

    Raises:
        UsageError: the shapes do not fit together.
    """
    _check_shapes(draft_tokens, draft_probs, target_probs)
    gamma = draft_tokens.shape[1]
    chosen = draft_tokens.unsqueeze(-1)
    p = target_probs[:, :gamma].gather(-1, chosen).squeeze(-1).double()
    q = draft_probs.gather(-1, chosen).squeeze(-1).double()
    # u * q < p is u < p / q without the division; the product is exact in float64, so p = q always accepts.
    stands = u_accept.double() * q < p
    accepted = stands.long().cumprod(-1).sum(-1)
    return Verdict(accepted, sample(_next_distribution(accepted, draft_probs, target_probs), u_next))


def verify_greedy(draft_tokens: Tensor, target_tokens: Tensor) -> Verdict:
    """:func:`verify` where both models take their likeliest tokens: no distribution is needed.

    Args:
        draft_tokens: int64 ``[batch, gamma]``.
        target_tokens: int64 ``[batch, gamma + 1]``, the target's choice after each token of the round.
    """
    gamma = draft_tokens.shape[1]
    accepted = (draft_tokens == target_tokens[:, :gamma]).long().cumprod(-1).sum(-1)
    return Verdict(accepted, target_tokens.gather(1, accepted[:, None])[:, 0])


def _next_distribution(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """What the token after the accepted ones is drawn from, not normalised: ``[batch, vocabulary]``."""
    gamma = draft_probs.shape[1]
    target = _row(target_probs, accepted)
    draft = _row(draft_probs, accepted.clamp(max=gamma - 1))
    rejected = (accepted < gamma).unsqueeze(-1)
    residual = (target - torch.where(rejected, draft, 0)).clamp(min=0)
    # Rounding may leave nothing to correct: then target and draft agree, and the target's row serves.
    return torch.where(residual.amax(-1, keepdim=True) > 0, residual, target)


def _row(probs: Tensor, index: Tensor) -> Tensor:
    """Row ``index[b]`` of ``probs[b]``: ``[batch, vocabulary]``."""
    return torch.take_along_dim(probs, index[:, None, None], dim=1).squeeze(1)


def _check_shapes(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor) -> None:
    batch, gamma = draft_tokens.shape
    vocabulary = target_probs.shape[-1]
    expected = [(batch, gamma, vocabulary), (batch, gamma + 1, vocabulary)]
    got = [tuple(draft_probs.shape), tuple(target_probs.shape)]
    if gamma < 1 or got != expected:
        raise UsageError(f"a round of gamma = {gamma} needs draft and target rows {expected}, not {got}")
