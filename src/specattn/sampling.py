"""From logits to distributions to tokens, all on the device, with random numbers that have no state."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.kernels.nucleus import nucleus

GOLDEN = 0x9E3779B97F4A7C15  # the increment and the multipliers of splitmix64 (Steele et al. 2014)
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
RESOLUTION = 2.0**40  # integer weight of the likeliest token; leaves room for 2**22 tokens in an int64 sum


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens (ties at the k-th all stay); 0 keeps all.
        top_p: then keep the smallest set with this much probability, in (0, 1].
        seed: int64; the same seed gives the same tokens, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature = {self.temperature} is out of range: give 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} is negative: give 0 (off) or the tokens to keep")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} is outside (0, 1]: 1 keeps every token")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed = {self.seed} does not fit in 64 bits: give one in [-2**63, 2**63)")


@dataclass(frozen=True)
class SamplingState:
    """The parameters of a batch: ``[batch]`` tensors on the device, and what lets the host skip idle work.

    Attributes:
        temperature: float32; top_k: int64; top_p: float64; seed: int64.
        sampled: whether any request is not greedy.
        max_top_k: the largest top_k of those requests, 0 if none has one.
        uses_top_p: whether any of them has top_p below 1.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    sampled: bool
    max_top_k: int
    uses_top_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingState:
        """The state of a batch of requests."""
        sampled = [each for each in params if each.temperature > 0]
        return cls(
            torch.tensor([each.temperature for each in params], dtype=torch.float32, device=device),
            torch.tensor([each.top_k for each in params], dtype=torch.int64, device=device),
            torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device),
            torch.tensor([each.seed for each in params], dtype=torch.int64, device=device),
            sampled=bool(sampled),
            max_top_k=max((each.top_k for each in sampled), default=0),
            uses_top_p=any(each.top_p < 1 for each in sampled),
        )

    def like(self, other: SamplingState) -> SamplingState:
        """These requests, with what ``other`` tells the host."""
        return replace(self, sampled=other.sampled, max_top_k=other.max_top_k, uses_top_p=other.uses_top_p)

    def load(self, other: SamplingState) -> None:
        """Copy the parameters of ``other`` into the first places of these tensors."""
        for name in ("temperature", "top_k", "top_p", "seed"):
            values = getattr(other, name)
            getattr(self, name)[: len(values)].copy_(values)


def warp(logits: Tensor, state: SamplingState) -> Tensor:
    """Logits ``[batch, rows, vocabulary]`` to probabilities of that shape, float32.

    Temperature, then top-k, then top-p, then renormalised (the order of Hugging Face ``generate``). A greedy
    request gets a one-hot row at the argmax, so that nothing downstream needs to know of it.
    """
    best = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if not state.sampled:
        return best
    temperature = state.temperature[:, None, None]
    greedy = temperature == 0
    # The maximum is taken off first, so that a tiny temperature cannot overflow.
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)
    if state.max_top_k:
        scaled = _keep_top_k(scaled, state)
    probs = scaled.softmax(-1)
    if state.uses_top_p:
        probs = _keep_top_p(probs, state)
    return torch.where(greedy, best, probs)


def _keep_top_k(logits: Tensor, state: SamplingState) -> Tensor:
    """Logits with everything below each request's k-th largest at -inf."""
    largest = min(state.max_top_k, logits.shape[-1])
    values = logits.topk(largest, dim=-1).values
    kth = (state.top_k[:, None, None] - 1).clamp(0, largest - 1).expand(*logits.shape[:-1], 1)
    cut = (logits < values.gather(-1, kth)) & (state.top_k > 0)[:, None, None]
    return logits.masked_fill(cut, -math.inf)


def _keep_top_p(probs: Tensor, state: SamplingState) -> Tensor:
    """Probabilities cut to each request's nucleus and renormalised."""
    lengths = torch.full_like(state.top_k, probs.shape[-1])
    kept = torch.where(nucleus(probs, state.top_p[:, None], lengths), probs, 0)
    return kept / kept.sum(-1, keepdim=True)


class Stream(enum.IntEnum):
    """Independent sequences of random numbers of one request."""

    DRAFT = 0
    ACCEPT = 1
    NEXT = 2
    PILOT = 3
    RESIDUAL = 4
    TAIL = 5


def uniform(seed: Tensor, counter: Tensor, stream: int = 0) -> Tensor:
    """Random numbers in [0, 1) that are a pure function of (seed, stream, counter); the same on every device.

    Two rounds of splitmix64's finaliser; a number is the top 24 bits of the hash times 2**-24.

    Args:
        seed: int64 ``[batch]``.
        counter: int64 ``[batch or 1, ...]``; give each draw of a request a value of its own.
        stream: separates draws that share a counter, see ``Stream``.

    Returns:
        float32 ``[batch, ...]``.
    """
    start = _mix(seed + _signed((stream + 1) * GOLDEN))
    start = start.reshape(-1, *[1] * (counter.dim() - 1))
    hashed = _mix(start + (counter + 1) * _signed(GOLDEN))
    return _shift(hashed, 40).float() * 2.0**-24


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of 64 bits in which each input bit changes half of the output's."""
    z = (z ^ _shift(z, 30)) * _signed(MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * _signed(MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """Tokens by the inverse of the cumulative distribution: int64 of the shape of ``u``.

    The sum runs over integers, 2**40 for the likeliest token. Unlike floats they add up the same in every
    order, so the result is the same on every device and a token of probability zero is never returned. A row
    without any probability, or with NaN, yields some token of the vocabulary.

    Args:
        probs: ``[..., vocabulary]``, non-negative; need not be normalised.
        u: ``[...]`` in [0, 1).
    """
    peak = probs.amax(-1, keepdim=True).double().clamp(min=torch.finfo(torch.float64).tiny)
    cumulative = (probs.double() / peak * RESOLUTION).long().cumsum(-1)
    target = (u.double().unsqueeze(-1) * cumulative[..., -1:]).long()
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return token.clamp(max=probs.shape[-1] - 1)
