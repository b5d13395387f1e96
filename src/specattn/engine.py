"""The engine: requests come and go between rounds, results stream out.

A round serves every active request at once; requests are admitted when there is room in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from specattn.accounting import fractions
from specattn.admission import Admission, Progress
from specattn.attention import attached
from specattn.audit import Audit, check_audit
from specattn.breakeven import BreakEven
from specattn.byte_model import ByteModel
from specattn.errors import SpecAttnError
from specattn.every import AUTO, EveryPolicy
from specattn.gamma import check_gamma
from specattn.ledger import CycleLedger
from specattn.lossless import LosslessSpeculator, check_lossless
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.memory import shortage
from specattn.pairs import Pair
from specattn.path import choose_path
from specattn.pipeline import Pipeline
from specattn.plan import candidates
from specattn.prefill.base import PrefillMethod
from specattn.prefill.registry import resolve_prefill
from specattn.request import ActiveRequest, GenerationResult, Request
from specattn.rounds import CycleRounds, Rounds, TorchRounds
from specattn.runner import ModelRunner
from specattn.selection.base import Method
from specattn.selection.eviction import check_prefill
from specattn.selection.registry import parse_method
from specattn.speculation import Speculator


@dataclass(frozen=True)
class Update:
    """News of one request: new text and tokens, and its result when it is done."""

    id: int
    tokens: list[int]
    text: str
    result: GenerationResult | None = None


class Engine:
    """Serves requests on a pair of models. Use it as a context manager: it attaches to the models and lets go of them.

    Args:
        pair: target, draft (or none, for plain decoding) and tokenizer.
        method: a method or its name with options, ``specattn:p=0.9``.
        mapping: the calibrated map; the pair's own if ``None``.
        gamma: draft tokens a round, or ``auto``.
        prefill: how the target reads prompts, a prefill method or its name with options; the draft reads densely.
        lossless: verify what sparse rounds accepted by dense passes, see :mod:`specattn.lossless`; there is nothing to
            fall back to then.
        lossless_every: after how many tokens, or ``auto``.
        fast: whether rounds run on the device alone (docs/architecture.md); ``None``: on a GPU, where they can.
        fallback: whether rounds in which the method does not pay read everything, or do without the draft; ``None``:
            on the fast path on a GPU. What pays is measured, so which tokens a sparse method gives may then differ
            from run to run.
        audit: share of the rounds' layers and KV heads that are compared with exact attention, see :class:`Audit`.
        max_batch: requests served at once.
        max_tokens: tokens of prompt and output that the caches hold, all requests together.
        max_length: tokens of prompt and output that one request can have; ``None``: as many as the caches hold and the
            models read. Rounds on the fast path have buffers for a batch of such requests.

    Raises:
        UsageError: if the method needs a draft or a mapping that is not there, an option is out of range, the
            prefill method cannot serve the target, the method cannot be lossless, or the fast path was asked for and
            cannot be taken.
        CacheFullError: if the caches do not fit in memory.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        method: Method | str = "specattn",
        mapping: Mapping | None = None,
        gamma: int | str = 4,
        prefill: PrefillMethod | str = "dense",
        lossless: bool = False,
        lossless_every: int | str | None = None,
        fast: bool | None = None,
        fallback: bool | None = None,
        audit: float = 0.0,
        max_batch: int = 1,
        max_tokens: int,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_gamma(gamma)
        self.pair = pair
        self.method = parse_method(method) if isinstance(method, str) else method
        self.prefill = resolve_prefill(prefill, pair.target.config)
        check_prefill(self.method, self.prefill)
        check_lossless(self.method, lossless, lossless_every)
        check_audit(audit, self.method)
        mapping = resolve_mapping(pair, self.method, mapping)
        mapping = mapping.to(pair.device) if mapping is not None else None
        self.path = choose_path(pair, self.method, fast, lossless=lossless, audited=audit > 0)
        if fallback is None:
            fallback = self.path.fast and pair.device.type == "cuda"
        drafting = pair.draft is not None
        plans = candidates(self.method, gamma, drafting=drafting, fallback=fallback, lossless=lossless)
        self.policy = BreakEven(plans, ByteModel.of(pair, self.method))
        every = EveryPolicy(AUTO if lossless_every is None else lossless_every)
        # A round writes up to gamma tokens beyond the last that counts; one too many goes on behind them. A cycle runs
        # as many ahead as are verified.
        slack = (self.policy.largest_gamma + 1) * (2 if self.path.fast else 1)
        slack += every.largest if lossless else 0
        size: dict[str, Any] = {
            "tokens": max_tokens + max_batch * slack,
            "slots": max_batch,
            "max_length": min(max_tokens, pair.context_limit, max_length or max_tokens) + slack,
        }
        target = ModelRunner(pair.target, stores=self.method.stores, **size)
        draft = None
        if pair.draft is not None:
            draft = ModelRunner(pair.draft, stores=self.method.draft_stores, **size)
        self.audit = Audit(audit, self.method.promised_error, pair.device) if audit else None
        slow = Speculator(target, draft, self.method, mapping, pair.vocab_size, self.audit)
        self.speculator: Speculator | LosslessSpeculator
        if lossless:
            self.speculator = LosslessSpeculator(slow, CycleLedger(every, self.policy), pair.context_limit)
            self._rounds: Rounds = _cycles(self.speculator, self.path.fast)
        else:
            self._rounds = _rounds(slow, self.path.fast)
            self.speculator = self._rounds.speculator
        self._pipeline = Pipeline(self._rounds, self.policy, pair.context_limit, lossless=lossless)
        self._admission = Admission(
            pair, self.speculator, self.prefill, slack=slack, audit=self.audit, progress=progress
        )
        self._active: dict[int, ActiveRequest] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Engine:
        self._exit.enter_context(attached(self.pair.target, self.pair.draft))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @property
    def nbytes(self) -> int:
        """Bytes of both KV caches."""
        return sum(runner.cache.nbytes for runner in self._admission.runners)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or active."""
        return not self._admission.waiting and not self._active

    def submit(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            UsageError: if it can never be served: empty, beyond the models' context.
            CacheFullError: if it is larger than the whole cache.
        """
        return self._admission.submit(request)

    def prepare(self, batches: Sequence[int] | None = None) -> None:
        """Have greedy rounds of all plans ready before requests come, for so many requests at once.

        On the fast path a round of another size of batch or draft length is compiled and captured when it is first
        needed, which takes seconds; with ``gamma="auto"`` or ``fallback`` that happens while requests wait. On the
        other path there is nothing to prepare, and cycles of the lossless mode are not prepared.

        Args:
            batches: numbers of requests, which are padded to powers of two; all up to ``max_batch`` if ``None``.
        """
        most = self._admission.runners[0].cache.spare_slot
        for requests in range(1, most + 1) if batches is None else batches:
            for plan in self.policy.plans:
                self._rounds.prepare(plan, requests)

    def stream(self) -> Iterator[Update]:
        """Run rounds until nothing is left to do."""
        while not self.idle:
            yield from self.advance()

    def advance(self) -> list[Update]:
        """Admit what fits, run one round for all active requests, and report what is new.

        On the fast path the news are those of the round before.

        Raises:
            CacheFullError: the device has too little memory for a round.
        """
        updates = self._admit()
        if self._active:
            updates += self._round()
        return updates

    def cancel(self, id: int) -> GenerationResult | None:
        """Stop a request where it is; ``None`` if it had not begun."""
        self._admission.withdraw(id)
        return self._finish(id) if id in self._active else None

    def _admit(self) -> list[Update]:
        updates = []
        while opened := self._admission.open():
            id, active = opened
            self._active[id] = active
            try:
                self._admission.read(active)
            except (SpecAttnError, RuntimeError) as error:
                active.finish_reason = "error"
                reason = shortage(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
                updates.append(Update(id, [], "", self._finish(id, error=reason)))
                continue
            self._rounds.enter(active)
            updates.append(self._update(id, 0))
        return updates

    def _round(self) -> list[Update]:
        return [self._update(id, known) for id, known in self._pipeline.advance(self._active)]

    def _update(self, id: int, before: int) -> Update:
        active = self._active[id]
        new, done = active.tokens[before:], active.finish_reason is not None
        text = active.stream.take(final=done)
        return Update(id, new, text, self._finish(id) if done else None)

    def _finish(self, id: int, error: str | None = None) -> GenerationResult:
        active = self._active.pop(id)
        target = self.speculator.target
        prefill = (self.prefill.spec(), target.prefill_meter.fraction(active.slot))
        audit = self.audit.finish(active.slot, float(target.meter.full[active.slot])) if self.audit else None
        for runner in self._admission.runners:
            runner.cache.free(active.slot)
        cycles = self.speculator.account(active.slot)
        return active.result(self.method.name, fractions(*active.reads), prefill, error, cycles, audit)


def _rounds(speculator: Speculator, fast: bool) -> Rounds:
    if not fast:
        return TorchRounds(speculator)
    from specattn.fast.rounds import FastRounds

    return FastRounds(speculator)


def _cycles(cycles: LosslessSpeculator, fast: bool) -> Rounds:
    if not fast:
        return CycleRounds(cycles)
    from specattn.fast.cycle_rounds import FastCycleRounds

    return FastCycleRounds(cycles)
