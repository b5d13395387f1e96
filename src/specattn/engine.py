"""The engine: requests come and go between rounds, results stream out.

A round serves every active request at once; requests are admitted when there is room in the caches.

On the fast path the next round is launched before the host has read the last one, which the round does not need: what
it begins with is on the device. A request that turns out to have ended in the last round has then had one round too
many. Nothing is left of it: its tokens are not looked at, the account is the one before it, and whoever gets the
request's pages writes them after that round, since all work on the device is done in the order of its launches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from specattn.accounting import fractions
from specattn.attention import attached
from specattn.audit import Audit, check_audit
from specattn.breakeven import BreakEven
from specattn.byte_model import ByteModel
from specattn.errors import CacheFullError, SpecAttnError
from specattn.every import AUTO, EveryPolicy
from specattn.gamma import check_gamma
from specattn.ledger import CycleLedger
from specattn.lossless import LosslessSpeculator, check_lossless
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.memory import shortage
from specattn.pairs import Pair
from specattn.path import choose_path
from specattn.plan import Plan, candidates
from specattn.prefill.base import PrefillMethod
from specattn.prefill.registry import resolve_prefill
from specattn.request import ActiveRequest, GenerationResult, Request
from specattn.rounds import CycleRounds, Flight, Rounds, TorchRounds, size_of
from specattn.runner import ModelRunner
from specattn.sampling import SamplingState, Stream, sample, uniform, warp
from specattn.selection.base import Method
from specattn.selection.eviction import check_prefill
from specattn.selection.registry import parse_method
from specattn.speculation import Speculator
from specattn.text import TextStream

Progress = Callable[[str, int], None]
"""Called with a model's role, ``target`` or ``draft``, and the prompt tokens that it has just read."""


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
        self._progress = progress
        every = EveryPolicy(AUTO if lossless_every is None else lossless_every)
        # A round writes up to gamma tokens beyond the last that counts; one too many goes on behind them. A cycle runs
        # as many ahead as are verified.
        self._slack = (self.policy.largest_gamma + 1) * (2 if self.path.fast else 1)
        self._slack += every.largest if lossless else 0
        size: dict[str, Any] = {
            "tokens": max_tokens + max_batch * self._slack,
            "slots": max_batch,
            "max_length": min(max_tokens, pair.context_limit, max_length or max_tokens) + self._slack,
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
        self._lossless = lossless
        self._waiting: deque[tuple[int, Request]] = deque()
        self._active: dict[int, ActiveRequest] = {}
        self._flight: Flight | None = None
        self._next_id = 0
        self._exit = ExitStack()

    def __enter__(self) -> Engine:
        self._exit.enter_context(attached(self.pair.target, self.pair.draft))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    @property
    def nbytes(self) -> int:
        """Bytes of both KV caches."""
        return sum(runner.cache.nbytes for runner in self._runners)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or active."""
        return not self._waiting and not self._active

    def submit(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            UsageError: if it can never be served: empty, beyond the models' context.
            CacheFullError: if it is larger than the whole cache.
        """
        request.check(self.pair.context_limit, self.pair.vocab_size)
        needed = self._room(request)
        if not self.speculator.target.cache.could_fit(needed):
            raise CacheFullError(
                f"the request needs {needed:,} tokens of KV cache, more than the engine has for one; "
                "create the engine with a larger max_tokens or max_length, or shorten the prompt or max_new_tokens"
            )
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

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
        self._waiting = deque(item for item in self._waiting if item[0] != id)
        return self._finish(id) if id in self._active else None

    # Admission

    def _admit(self) -> list[Update]:
        updates = []
        while self._waiting and self._fits(self._waiting[0][1]):
            id, request = self._waiting.popleft()
            active = self._open(request)
            self._active[id] = active
            try:
                self._prefill(active)
            except (SpecAttnError, RuntimeError) as error:
                active.finish_reason = "error"
                reason = shortage(error) if isinstance(error, torch.OutOfMemoryError) else str(error)
                updates.append(Update(id, [], "", self._finish(id, error=reason)))
                continue
            self._rounds.enter(active)
            updates.append(self._update(id, 0))
        return updates

    def _fits(self, request: Request) -> bool:
        # An evicting method leaves more room in the target's cache than in the draft's.
        return all(runner.cache.fits(self._room(request)) for runner in self._runners)

    def _room(self, request: Request) -> int:
        longest = min(len(request.prompt) + request.max_new_tokens, self.pair.context_limit)
        return longest + self._slack

    def _open(self, request: Request) -> ActiveRequest:
        slots = [runner.cache.allocate(self._room(request)) for runner in self._runners]
        assert len(set(slots)) == 1, "both caches hold the same requests"
        for runner in self._runners:
            runner.meter.reset(slots[0])
            runner.prefill_meter.reset(slots[0])
        if self.audit is not None:
            self.audit.begin(slots[0], request.sampling.seed)
        limit = min(request.max_new_tokens, self.pair.context_limit - len(request.prompt))
        stream = TextStream(self.pair.tokenizer, request.stop)
        return ActiveRequest(request, slots[0], stream, self.pair.eos_token_ids, limit)

    def _prefill(self, active: ActiveRequest) -> None:
        started = perf_counter()
        prompt = active.request.prompt
        logits = self.speculator.prefill(
            active.slot, prompt, method=self.prefill, progress=self._report("target")
        )
        if self.speculator.draft is not None:
            # What the draft sees decides what is selected and accepted, and reading is cheap for it: it stays dense.
            self.speculator.draft.prefill(active.slot, prompt, progress=self._report("draft"))
        sampling = SamplingState.of([active.request.sampling], logits.device)
        probs = warp(logits[None, None, : self.pair.vocab_size], sampling)
        counter = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
        token = sample(probs, uniform(sampling.seed, counter, Stream.NEXT))
        active.push([int(token)])
        active.decode_started = perf_counter()
        active.seconds["prefill"] = active.decode_started - started

    def _report(self, role: str) -> Callable[[int], None] | None:
        progress = self._progress
        return (lambda count: progress(role, count)) if progress else None

    # Rounds

    def _round(self) -> list[Update]:
        updates, requests = [], self._going_on()
        plan = self.policy.choose(size_of(requests)) if requests else None
        if plan and self._must_know(requests, plan):
            updates, requests = self._drain(), self._going_on()
        with self._fitting(requests):
            flight = self._launch(requests, plan) if plan and requests else None
        if self._rounds.ahead:
            flight, self._flight = self._flight, flight
        return updates + self._settle(flight)

    @contextmanager
    def _fitting(self, requests: dict[int, ActiveRequest]) -> Iterator[None]:
        """Say what needs less where a round of ``requests`` runs out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            longest = max(active.length for active in requests.values())
            raise CacheFullError(
                f"{self.pair.device} has not enough memory for a round of {len(requests)} requests of up to "
                f"{longest:,} tokens: {shortage(error)}. Serve fewer at once (max_batch, --batch), or shorter ones"
            ) from error

    def _going_on(self) -> dict[int, ActiveRequest]:
        """The requests of the next round: all but those that the round in flight will end, as it has a token."""
        return {
            id: active
            for id, active in self._active.items()
            if active.finish_reason is None and len(active.tokens) + self._in_flight(id) < active.limit
        }

    def _in_flight(self, id: int) -> bool:
        return self._flight is not None and id in self._flight.requests

    def _must_know(self, requests: dict[int, ActiveRequest], plan: Plan) -> bool:
        """Whether the next round depends on what the host has not read: near the context's end, or for the draft."""
        if self._flight is None:
            return False
        ahead = self._flight.plan.gamma
        return self._rows_left(requests) < plan.gamma + ahead + 1 or ahead == 0 < plan.gamma

    def _rows_left(self, requests: dict[int, ActiveRequest]) -> int:
        """Draft tokens for which the context has room."""
        return self.pair.context_limit - 1 - max(active.length for active in requests.values())

    def _launch(self, requests: dict[int, ActiveRequest], plan: Plan) -> Flight:
        """Start a round in which no row lies beyond the context's end.

        gamma is not cut to what the requests may still produce: a request's rounds, and with them what a sparse method
        selects, would then depend on its neighbours. Near the context's end, and with ``auto``, they do.
        """
        plan = Plan(max(0, min(plan.gamma, self._rows_left(requests))), plan.sparse)
        if plan.gamma:
            for active in requests.values():
                self._catch_up(active)
        return self._rounds.launch(requests, plan)

    def _catch_up(self, active: ActiveRequest) -> None:
        """Let the draft read what was decoded without it."""
        draft = self.speculator.draft
        assert draft is not None
        behind = draft.cache.length(active.slot)
        if behind < active.length - 1:
            draft.prefill(active.slot, active.text[behind : active.length - 1])

    def _drain(self) -> list[Update]:
        """Wait for the round in flight."""
        flight, self._flight = self._flight, None
        return self._settle(flight)

    def _settle(self, flight: Flight | None) -> list[Update]:
        """Take in what a round has produced; requests that have ended by now had it for nothing."""
        if flight is None:
            return []
        landed = flight.land()
        if not self._lossless:
            self.policy.observe(flight.plan, flight.size, landed.seconds)
        return [
            self._take(id, active, flight.plan, tokens, reads)
            for (id, active), tokens, reads in zip(
                flight.requests.items(), landed.tokens, landed.reads, strict=True
            )
            if id in self._active
        ]

    def _take(
        self, id: int, active: ActiveRequest, plan: Plan, tokens: Sequence[int], reads: Sequence[float]
    ) -> Update:
        known = len(active.tokens)
        active.accepted.append(len(tokens) - 1)
        active.proposed += plan.gamma
        read, full = (after - before for after, before in zip(reads[:2], active.reads[:2], strict=True))
        if not self._lossless:  # a cycle has told of its rounds
            self.policy.observe_request(plan, len(tokens) - 1, read / full)
        active.reads = reads
        active.push(tokens)
        self._rounds.commit(active, plan)
        return self._update(id, known)

    # Results

    @property
    def _runners(self) -> list[ModelRunner]:
        draft = self.speculator.draft
        return [self.speculator.target] + ([draft] if draft is not None else [])

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
        for runner in self._runners:
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
