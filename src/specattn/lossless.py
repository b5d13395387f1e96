"""The lossless mode: tokens that sparse verification accepted are themselves a draft, which a dense pass verifies.

A cycle of a request begins like a round: n tokens in the target's cache, all of them read densely, and a pending one.
Sparse rounds run ahead by k tokens x1 ... xk. Then the target reads the pending token and x1 ... x(k-1) densely, which
writes their keys and values of all layers anew, and chooses a token after each. Its choices are delivered up to the
first that differs from what was run ahead, which is delivered too; the rest leaves no trace in either cache.

What is delivered are the dense pass's own choices, so they do not depend on what was proposed, nor on how. For that to
be a good bet when tokens are sampled, draft, sparse and dense passes draw the token at a position by the same race
(:func:`specattn.sampling.race`): where their distributions are alike they mostly choose the same token.

No token is added to k accepted ones. It would be one of k + 1, and the draft would have to read x(k-1) after all: its
cache is trusted up to the token before the last, see :mod:`specattn.speculation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from specattn.attention import DenseAttend
from specattn.breakeven import Size
from specattn.errors import UsageError
from specattn.every import check_every
from specattn.ledger import CycleLedger
from specattn.plan import Plan, draft_steps
from specattn.prefill.base import PrefillMethod
from specattn.request import CycleAccount
from specattn.runner import ModelRunner, Progress
from specattn.sampling import race
from specattn.selection.base import Method
from specattn.selection.eviction import Evicting
from specattn.speculation import Batch, Outcome, Speculator
from specattn.target_scores import ScoringAttend


def check_lossless(method: Method, lossless: bool, every: int | str | None) -> None:
    """Refuse a method whose tokens a dense pass cannot verify, or need not, and an ``every`` that nobody heeds.

    Raises:
        UsageError: naming the value and the remedy.
    """
    if every is not None:
        check_every(every)
        if not lossless:
            raise UsageError(
                f"lossless_every={every} has no effect without lossless; add it, or leave this out"
            )
    if not lossless:
        return
    if isinstance(method, Evicting):
        raise UsageError(
            f"lossless with method {method.name!r}: a dense pass reads every token, and this method drops tokens for "
            "good; use one that keeps them, such as specattn, quest or streaming, or leave lossless out"
        )
    if method.name == "dense":
        raise UsageError(
            "lossless with method 'dense': its rounds read everything and are lossless already; "
            "leave lossless out, or use a method that reads less"
        )


@dataclass(frozen=True)
class RacingBatch(Batch):
    """A batch whose tokens are chosen by races; ``rounds`` are the positions of the pending tokens."""

    def warp(self, logits: Tensor, row: int) -> Tensor:
        """One-hot rows at the chosen tokens."""
        probs = super().warp(logits, row)
        if not self.sampling.sampled:
            return probs
        positions = self.rounds[:, None] + row + torch.arange(probs.shape[1], device=probs.device)
        return race(probs, self.sampling.seed, positions)


class LosslessSpeculator:
    """Runs cycles: rounds of ``sparse``, then one dense pass over what they accepted, for all requests at once.

    To the engine a cycle is a round that yields many tokens.

    Args:
        sparse: runs the rounds; it owns the caches.
        ledger: says how long cycles are and is told what they did.
        context_limit: tokens that the models can take; no row lies beyond.
    """

    def __init__(self, sparse: Speculator, ledger: CycleLedger, context_limit: int) -> None:
        self.sparse, self.ledger, self.context_limit = sparse, ledger, context_limit
        self.target, self.draft = sparse.target, sparse.draft
        self._weights = [_weight_bytes(runner) for runner in (self.target, self.draft)]
        self._weights_read = 0

    def prefill(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        method: PrefillMethod | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read a prompt, see :meth:`specattn.speculation.Speculator.prefill`."""
        self.ledger.open(slot)
        return self.sparse.prefill(slot, prompt, method=method, progress=progress)

    def account(self, slot: int) -> CycleAccount:
        """What the cycles of the request in ``slot`` did."""
        return self.ledger.account(slot)

    def round(self, batch: Batch, gamma: int) -> Outcome:
        """One cycle; ``gamma`` is that of its sparse rounds. The lengths are left to :meth:`commit`."""
        start = self._bytes_read()
        ahead = self._run_ahead(batch, gamma)
        middle = self._bytes_read()
        chosen, accepted = self._verify(batch, ahead)
        counts = [len(tokens) for tokens in ahead]
        for slot, proposed, stand in zip(batch.slots, counts, accepted.tolist(), strict=True):
            self.ledger.add_pass(slot, proposed, stand)
        tokens = sum(counts) / len(counts)
        self.ledger.add_cost((middle - start) / tokens, self._bytes_read() - middle)
        return Outcome(chosen, torch.minimum(accepted + 1, torch.tensor(counts, device=accepted.device)))

    def commit(self, slot: int, length: int) -> None:
        """Let the text of ``slot`` be ``length`` tokens long, see :meth:`specattn.speculation.Speculator.commit`."""
        self.sparse.commit(slot, length)

    def _run_ahead(self, batch: Batch, gamma: int) -> list[list[int]]:
        """The tokens of sparse rounds: of each request until it has enough, or stands at the context's end."""
        (every, rounds), recent = self.ledger.choose(gamma), batch.recent.tolist()
        ahead: list[list[int]] = [[] for _ in recent]
        for _ in range(rounds):
            lengths = [length + len(tokens) for length, tokens in zip(batch.lengths, ahead, strict=True)]
            running = [
                request
                for request, tokens in enumerate(ahead)
                if len(tokens) < every and lengths[request] < self.context_limit
            ]
            if not running:
                break
            text = [(recent[request] + ahead[request])[-2:] for request in running]
            round = _some(batch, running, [lengths[request] for request in running], text)
            for request, tokens in zip(running, self._sparse_round(round, gamma), strict=True):
                ahead[request] += tokens
        return ahead

    def _sparse_round(self, batch: Batch, gamma: int) -> list[list[int]]:
        """The tokens of one sparse round, which are in the caches afterwards."""
        gamma = min(gamma, self.context_limit - 1 - max(batch.lengths))
        started, before = perf_counter(), self._reads(batch.slots)
        outcome = self.sparse.round(batch, gamma)
        self._weights_read += self._weights[0] + draft_steps(self.sparse.method, gamma) * self._weights[1]
        read, full = self._reads(batch.slots) - before
        counts, shares = outcome.counts.tolist(), (read / full).tolist()
        plan, size = Plan(gamma, sparse=True), Size(len(batch.slots), sum(batch.lengths))
        self.ledger.add_round(plan, size, perf_counter() - started)
        for slot, length, count, share in zip(batch.slots, batch.lengths, counts, shares, strict=True):
            self.sparse.commit(slot, length + count)
            self.ledger.add_request(slot, plan, count - 1, share)
        return [row[:count] for row, count in zip(outcome.tokens.tolist(), counts, strict=True)]

    def _verify(self, batch: Batch, ahead: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The dense pass: its choices ``[batch, rows]``, and how many of ``ahead`` are among them ``[batch]``."""
        counts, recent, device = [len(tokens) for tokens in ahead], batch.recent.tolist(), batch.recent.device
        proposed = torch.tensor(_padded(ahead), device=device)
        fed = _padded([[last, *tokens[:-1]] for (_, last), tokens in zip(recent, ahead, strict=True)])
        for slot, length in zip(batch.slots, batch.lengths, strict=True):
            self.target.cache.set_length(slot, length)  # what the sparse rounds wrote is written anew
        scores = self.sparse.scores
        attend = DenseAttend() if scores is None else ScoringAttend(scores)
        step = self.target.step(batch.slots, batch.lengths, counts, attend)
        logits = self.target.forward(step, torch.tensor(fed, device=device), max(counts))
        self._weights_read += self._weights[0]
        racing = _some(batch, range(len(counts)), batch.lengths, recent)
        chosen = racing.warp(logits[..., : self.sparse.vocab_size], 0).argmax(-1)
        agree = (chosen == proposed).long().cumprod(-1).sum(-1)
        return chosen, torch.minimum(agree, torch.tensor(counts, device=device))

    def _reads(self, slots: Sequence[int]) -> Tensor:
        """Bytes that the target read for these requests, and that it would have read in full, ``[2, batch]``."""
        meter = self.target.meter
        return torch.stack([meter.read, meter.full])[:, list(slots)]

    def _bytes_read(self) -> float:
        """Weights and KV-side state read so far; only differences mean something."""
        runners = [self.target] + ([self.draft] if self.draft is not None else [])
        return self._weights_read + sum(float(runner.meter.read.sum()) for runner in runners)


def _some(
    batch: Batch, requests: Sequence[int], lengths: Sequence[int], recent: Sequence[Sequence[int]]
) -> RacingBatch:
    """Some requests of ``batch``, where they stand by now."""
    device = batch.recent.device
    return RacingBatch(
        slots=[batch.slots[request] for request in requests],
        lengths=lengths,
        recent=torch.tensor(recent, device=device),
        rounds=torch.tensor(lengths, device=device),
        sampling=batch.sampling.of_requests(requests),
    )


def _padded(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """Lists of equal length: the shorter ones repeat what comes last, as their rows do."""
    longest = max(map(len, lists))
    return [[*tokens, *[tokens[-1]] * (longest - len(tokens))] for tokens in lists]


def _weight_bytes(runner: ModelRunner | None) -> int:
    return 0 if runner is None else sum(parameter.nbytes for parameter in runner.model.parameters())
