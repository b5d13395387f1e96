"""The audit: a sample of sparse attention compared with the exact one, while a request is served.

The unit is one KV head of one layer in one round of one request. Each is drawn with the same probability, from the
request's seed and where the round stands, so that a request is audited alike in any batch. What is decoded does not
depend on the audit.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.attention import LayerCall, Step
from specattn.errors import UsageError
from specattn.kernels.dense_attention import attention_probabilities, weighted_values
from specattn.selection.base import Method, Selection
from specattn.selection.eviction import Evicting


@dataclass(frozen=True)
class AuditReport:
    """What was found out about a request. Means and extremes are over queries: a row and one of its query heads.

    Attributes:
        rate: the share of units that was asked for.
        units, queries: how many were compared.
        attention_mass, least_mass: share of the exact attention that the selected tokens hold.
        output_error, largest_error: the output's relative error, in the Euclidean norm.
        promised_error, violations: what the method promises, if it does, and the share of queries beyond it.
        read_fraction: bytes that the audit read, over those of dense attention; in no other figure.
    """

    rate: float
    units: int
    queries: int
    attention_mass: float
    least_mass: float
    output_error: float
    largest_error: float
    promised_error: float | None
    violations: float | None
    read_fraction: float


class _Account:
    """Of one request; what the host does not know stays on the device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.units = self.queries = self.nbytes = 0
        self.mass, self.error, self.violations = torch.zeros(3, dtype=torch.float64, device=device)
        self.least, self.largest = torch.ones_like(self.mass), torch.zeros_like(self.mass)

    def add(self, mass: Tensor, error: Tensor, promised: float | None, nbytes: int) -> None:
        """Count a unit, of whose queries each has its ``mass`` and ``error``."""
        self.units, self.queries, self.nbytes = (
            self.units + 1,
            self.queries + mass.numel(),
            self.nbytes + nbytes,
        )
        self.mass, self.error = self.mass + mass.sum(), self.error + error.sum()
        self.least, self.largest = (
            torch.minimum(self.least, mass.min()),
            torch.maximum(self.largest, error.max()),
        )
        if promised is not None:
            self.violations = self.violations + (error > promised).sum()


class Audit:
    """Observes sparse layers and keeps an account of each slot.

    Args:
        rate: share of the units that are compared, in (0, 1].
        promised: the relative error whose violations are counted.
    """

    def __init__(self, rate: float, promised: float | None, device: torch.device) -> None:
        self.rate, self.promised, self.device = rate, promised, device
        self._accounts: dict[int, _Account] = {}

    def begin(self, slot: int, seed: int) -> None:
        """Open the account of the request in ``slot``."""
        self._accounts[slot] = _Account(seed, self.device)

    def __call__(self, step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        for request, slot in enumerate(step.host_slots):
            account = self._accounts[slot]
            for head in self._drawn(
                account.seed, step.starts[request], call.layer, selection.counts.shape[1]
            ):
                mass, error, nbytes = _compare(step, call, selection, output, request, head)
                account.add(mass, error, self.promised, nbytes)

    def finish(self, slot: int, full: float) -> AuditReport:
        """Close the account of ``slot``, whose dense attention would have read ``full`` bytes."""
        account = self._accounts.pop(slot)
        queries = max(1, account.queries)
        return AuditReport(
            rate=self.rate,
            units=account.units,
            queries=account.queries,
            attention_mass=float(account.mass) / queries if account.queries else 1.0,
            least_mass=float(account.least),
            output_error=float(account.error) / queries,
            largest_error=float(account.largest),
            promised_error=self.promised,
            violations=None if self.promised is None else float(account.violations) / queries,
            read_fraction=account.nbytes / full if full else 0.0,
        )

    def _drawn(self, seed: int, start: int, layer: int, kv_heads: int) -> list[int]:
        draw = random.Random(f"{seed} {start} {layer}").random
        return [head for head in range(kv_heads) if draw() < self.rate]


def _compare(
    step: Step, call: LayerCall, selection: Selection, output: Tensor, request: int, head: int
) -> tuple[Tensor, Tensor, int]:
    """Kept mass ``[group, rows]`` and relative error ``[rows, group]`` of a KV head, and the bytes this has read."""
    group = call.query.shape[2] // selection.counts.shape[1]
    heads = slice(head * group, (head + 1) * group)
    segments, _ = step.segments(call.layer, request, None)
    own = [(key[:, head : head + 1], value[:, head : head + 1]) for key, value in segments]
    query = call.query[request, :, heads]
    exact = attention_probabilities(query, own, step.starts[request], 0, call.scaling)
    listed = selection.indices[request, head]
    mass = (exact[..., listed.clamp(min=0)] * (listed >= 0)).sum(-1).double()
    wanted = weighted_values(exact, own).double()
    size = wanted.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    error = (output[request, :, heads].double() - wanted).norm(dim=-1) / size
    return mass, error, exact.shape[-1] * step.cache.geometry.row_bytes


def check_audit(rate: float, method: Method) -> None:
    """Refuse a rate outside [0, 1], and an audit where tokens are gone for good.

    Raises:
        UsageError: naming the value.
    """
    if not 0 <= rate <= 1:
        raise UsageError(f"audit={rate} is outside [0, 1]; use for example audit=0.01, or 0 for none")
    if rate and isinstance(method, Evicting):
        raise UsageError(
            f"an audit compares what is read with all that could be, and method {method.name!r} drops it; "
            "leave the audit out, or use a method that keeps the cache"
        )
