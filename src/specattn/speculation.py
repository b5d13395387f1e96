"""A round of speculative decoding: draft, select, verify, accept, roll back.

Before a round the target's cache holds n tokens; two more are known to matter: the *previous* token, at position n - 1,
and the *pending* one, at position n, which the target has not read. The draft's cache is trusted up to n - 1 only: its
first step reads both tokens again, so that every round has the same shape whether or not the last was accepted whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from specattn.acceptance import Verdict, verify
from specattn.attention import Attend, DenseAttend, ExportAttend, SelectionObserver, SparseAttend
from specattn.draft_attention import DraftAttention, ExportedHeads
from specattn.eviction import Eviction
from specattn.gamma import LARGEST_GAMMA
from specattn.mapping.artifact import Mapping
from specattn.prefill.base import PrefillMethod
from specattn.request import CycleAccount
from specattn.runner import ModelRunner, Progress
from specattn.sampling import SamplingState, Stream, sample, uniform, warp
from specattn.selection.base import Method, Need, RoundState
from specattn.selection.dense import Dense
from specattn.selection.eviction import Evicting
from specattn.target_scores import ScoreEverything, ScoringAttend, TargetScores

DRAWS_A_ROUND = LARGEST_GAMMA
"""Random numbers a stream may use in one round: one for each draft token."""


@dataclass(frozen=True)
class Batch:
    """The requests of a round.

    Attributes:
        slots: their slots, the same in both caches.
        lengths: n, tokens in the target's cache.
        recent: int64 ``[batch, 2]``: the previous and the pending token.
        rounds: int64 ``[batch]``, rounds that each request has had: the counter of its random numbers.
        sampling: how each request draws.
    """

    slots: Sequence[int]
    lengths: Sequence[int]
    recent: Tensor
    rounds: Tensor
    sampling: SamplingState

    def warp(self, logits: Tensor, row: int) -> Tensor:
        """What the tokens of row ``row`` and those after it are drawn from, for ``logits`` ``[batch, rows, vocab]``."""
        return warp(logits, self.sampling)

    def uniform(self, stream: Stream, draw: int | Tensor) -> Tensor:
        """Random numbers of this round: ``[batch]`` for one draw, ``[batch, n]`` for ``n`` of them."""
        counter = self.rounds * DRAWS_A_ROUND + draw if isinstance(draw, int) else self._counters(draw)
        return uniform(self.sampling.seed, counter, stream)

    def _counters(self, draws: Tensor) -> Tensor:
        return self.rounds[:, None] * DRAWS_A_ROUND + draws


@dataclass(frozen=True)
class Proposal:
    """What the draft offers: ``tokens`` ``[batch, gamma]`` drawn from ``probabilities`` ``[batch, gamma, vocab]``."""

    tokens: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Outcome:
    """The tokens of a round: row b of ``tokens`` ``[batch, gamma + 1]`` is valid up to ``counts[b]`` of them."""

    tokens: Tensor
    counts: Tensor

    @classmethod
    def of(cls, proposed: Tensor, verdict: Verdict) -> Outcome:
        """The accepted ones of the tokens ``proposed`` ``[batch, gamma]``, and the one that follows them."""
        tokens = torch.cat([proposed, proposed[:, :1]], dim=1)
        tokens.scatter_(1, verdict.accepted[:, None], verdict.next_token[:, None])
        return cls(tokens, verdict.accepted + 1)


@dataclass
class Speculator:
    """Runs rounds of one draft and target with one method. ``draft`` may be missing: then gamma is 0.

    Attributes:
        eviction: what drops tokens of the target's cache, if the method does; the draft's cache keeps all of them.
        scores: what the target attended to in dense passes, if the method wants to know.
    """

    target: ModelRunner
    draft: ModelRunner | None
    method: Method
    mapping: Mapping | None
    vocab_size: int
    observer: SelectionObserver | None = None
    eviction: Eviction | None = field(init=False, default=None)
    scores: TargetScores | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.method, Evicting):
            self.eviction = Eviction(self.method, self.target)
        if Need.SCORES in self.method.needs:
            self.scores = TargetScores.of(self.target)

    @property
    def remembers(self) -> bool:
        """Whether rounds leave something behind that later ones go by: then none may run elsewhere."""
        return self.eviction is not None or self.scores is not None

    def variant(self, *, drafting: bool, sparse: bool) -> Speculator:
        """Rounds on the same models and caches without the draft, or with a target that reads all of its cache."""
        if (drafting or self.draft is None) and (sparse or isinstance(self.method, Dense)):
            return self
        method, mapping = (self.method, self.mapping) if sparse else (Dense(), None)
        draft = self.draft if drafting else None
        return Speculator(self.target, draft, method, mapping, self.vocab_size, self.observer)

    def prefill(
        self,
        slot: int,
        prompt: Sequence[int],
        *,
        method: PrefillMethod | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read a prompt into the target's cache, as :meth:`ModelRunner.prefill` does, and evict what must go."""
        if self.scores is not None:
            return self.scores.prefill(self.target, slot, prompt, method=method, progress=progress)
        reader = self.eviction or self.target
        return reader.prefill(slot, prompt, method=method, progress=progress)

    def round(self, batch: Batch, gamma: int) -> Outcome:
        """One round. The caches' lengths are left to :meth:`commit`, which knows what the host accepted."""
        export = self.export(batch.lengths, gamma)
        proposal = self._propose(batch, gamma, export)
        target_probs = self._verify(batch, proposal, export)
        if proposal is None:
            token = sample(target_probs, batch.uniform(Stream.NEXT, 0)[:, None])
            return Outcome(token, torch.ones_like(token[:, 0]))
        u_accept = batch.uniform(Stream.ACCEPT, torch.arange(gamma, device=self.target.device))
        verdict = verify(
            proposal.tokens, proposal.probabilities, target_probs, u_accept, batch.uniform(Stream.NEXT, 0)
        )
        return Outcome.of(proposal.tokens, verdict)

    def commit(self, slot: int, length: int) -> None:
        """Let the text of ``slot`` be ``length`` tokens long: rejected ones leave no trace in either cache."""
        cache = self.target.cache
        new = length - cache.position(slot)
        cache.set_length(slot, cache.length(slot) + new)
        if self.scores is not None:
            self.scores.commit(slot, new)
        if self.eviction is not None:
            self.eviction.after_round(slot, new)
        if self.draft is not None:
            self.draft.cache.set_length(slot, length - 1)

    def account(self, slot: int) -> CycleAccount | None:
        """What the cycles of the request in ``slot`` did, if its rounds are verified in cycles."""
        return None

    def export(self, lengths: Sequence[int], gamma: int) -> DraftAttention | None:
        """Where the draft's scores of a round go, if the method wants them."""
        if Need.DRAFT not in self.method.needs or self.draft is None or gamma == 0:
            return None
        return DraftAttention(
            self._exported_heads,
            batch=len(lengths),
            rows=gamma + (Need.EVERY_ROW in self.method.needs),
            length=max(lengths) + gamma + 1,
            device=self.draft.device,
        )

    @cached_property
    def _exported_heads(self) -> ExportedHeads:
        assert self.draft is not None
        heads = self.method.draft_heads(self.mapping)
        return ExportedHeads.of(self.draft.geometry, heads, self.draft.device)

    def sparse_attend(
        self, slots: Sequence[int], lengths: Sequence[int], rows: int, export: DraftAttention | None
    ) -> Attend:
        """How the target's pass of a round answers attention calls."""
        if self.eviction is not None:
            return self.eviction.attend
        if Need.DRAFT in self.method.needs and export is None:
            return DenseAttend() if self.scores is None else ScoringAttend(self.scores)
        geometry = self.target.geometry
        observers = [self.observer] if self.observer is not None else []
        scores = None
        if self.scores is not None:
            everything = [self.method.reads_everything(self.scores.rounds(slot) + 1) for slot in slots]
            scores = self.scores.stored(slots, max(lengths) + rows, everything)
            observers.append(ScoreEverything(self.scores, everything))
        state = RoundState(
            starts=torch.tensor(lengths, dtype=torch.int32, device=self.target.device),
            rows=rows,
            max_length=max(lengths) + rows,
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            query_heads=geometry.query_heads,
            draft=export,
            mapping=self.mapping,
            scores=scores,
            text=self._text(slots),
        )
        return SparseAttend(self.method, state, observers)

    def _text(self, slots: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        if Need.TEXT not in self.method.needs:
            return None
        return self.target.cache.text, torch.tensor(slots, device=self.target.device)

    def _propose(self, batch: Batch, gamma: int, export: DraftAttention | None) -> Proposal | None:
        if self.draft is None:
            return None
        draft, tokens, probabilities = self.draft, [], []
        fed, starts = batch.recent, [length - 1 for length in batch.lengths]
        # A round without proposals still feeds the draft, so that its cache keeps up.
        for row in range(max(gamma, 1)):
            attend = ExportAttend(export, row, 1) if export is not None else DenseAttend()
            step = draft.step(batch.slots, starts, fed.shape[1], attend)
            probs = batch.warp(draft.forward(step, fed, 1)[..., : self.vocab_size], row)
            fed = sample(probs, batch.uniform(Stream.DRAFT, row)[:, None])
            starts = [length + row + 1 for length in batch.lengths]
            tokens.append(fed)
            probabilities.append(probs)
        if not gamma:
            return None
        if export is not None and export.rows > gamma:
            step = draft.step(batch.slots, starts, 1, ExportAttend(export, gamma, 1))
            draft.forward(step, fed, 1)
        return Proposal(torch.cat(tokens, 1), torch.cat(probabilities, 1))

    def _verify(self, batch: Batch, proposal: Proposal | None, export: DraftAttention | None) -> Tensor:
        """The target's distributions ``[batch, gamma + 1, vocab]`` for the pending token and the proposals."""
        tokens = batch.recent[:, 1:]
        if proposal is not None:
            tokens = torch.cat([tokens, proposal.tokens], dim=1)
        rows = tokens.shape[1]
        attend = self.sparse_attend(batch.slots, batch.lengths, rows, export)
        step = self.target.step(batch.slots, batch.lengths, rows, attend)
        logits = self.target.forward(step, tokens, rows)
        return batch.warp(logits[..., : self.vocab_size], 0)
