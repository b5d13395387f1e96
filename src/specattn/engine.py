"""The engine: requests come and go between rounds, results stream out.

A round serves every active request at once; requests are admitted when there is room in the caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from specattn.accounting import read_fractions
from specattn.attention import attached
from specattn.audit import Audit, check_audit
from specattn.errors import CacheFullError, SpecAttnError
from specattn.every import AUTO, EveryPolicy
from specattn.gamma import GammaPolicy, check_gamma
from specattn.lossless import LosslessSpeculator, check_lossless
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.pairs import Pair
from specattn.prefill.base import PrefillMethod
from specattn.prefill.registry import resolve_prefill
from specattn.request import ActiveRequest, GenerationResult, Request
from specattn.runner import ModelRunner
from specattn.sampling import SamplingState, Stream, sample, uniform, warp
from specattn.selection.base import Method
from specattn.selection.eviction import check_prefill
from specattn.selection.registry import parse_method
from specattn.speculation import Batch, Speculator
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
        lossless: verify what sparse rounds accepted by dense passes, see :mod:`specattn.lossless`.
        lossless_every: after how many tokens, or ``auto``.
        audit: share of the rounds' layers and KV heads that are compared with exact attention, see :class:`Audit`.
        max_batch: requests served at once.
        max_tokens: tokens of prompt and output that the caches hold, all requests together.

    Raises:
        UsageError: if the method needs a draft or a mapping that is not there, an option is out of range, the
            prefill method cannot serve the target, or the method cannot be lossless.
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
        audit: float = 0.0,
        max_batch: int = 1,
        max_tokens: int,
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
        self.policy = GammaPolicy(gamma, cost=_draft_cost(pair))
        self._progress = progress
        every = EveryPolicy(AUTO if lossless_every is None else lossless_every)
        # A round writes up to gamma tokens beyond the last that counts, and a cycle runs as many ahead as are verified.
        self._slack = self.policy.largest + 1 + (every.largest if lossless else 0)
        size: dict[str, Any] = {
            "tokens": max_tokens + max_batch * self._slack,
            "slots": max_batch,
            "max_length": max_tokens + self._slack,
        }
        target = ModelRunner(pair.target, stores=self.method.stores, **size)
        draft = ModelRunner(pair.draft, **size) if pair.draft is not None else None
        self.audit = Audit(audit, self.method.promised_error, pair.device) if audit else None
        self.speculator: Speculator | LosslessSpeculator
        self.speculator = Speculator(target, draft, self.method, mapping, pair.vocab_size, self.audit)
        if lossless:
            self.speculator = LosslessSpeculator(
                self.speculator, every, pair.context_limit, self.policy.observe
            )
        self._waiting: deque[tuple[int, Request]] = deque()
        self._active: dict[int, ActiveRequest] = {}
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
                f"the request needs {needed:,} tokens of KV cache, more than the engine has; "
                "create the engine with a larger max_tokens, or shorten the prompt or max_new_tokens"
            )
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def stream(self) -> Iterator[Update]:
        """Run rounds until nothing is left to do."""
        while not self.idle:
            yield from self.advance()

    def advance(self) -> list[Update]:
        """Admit what fits, run one round for all active requests, and report what is new."""
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
                updates.append(Update(id, [], "", self._finish(id, error=str(error))))
                continue
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
        ids = [id for id, active in self._active.items() if active.finish_reason is None]
        if not ids:
            return []
        requests = [self._active[id] for id in ids]
        gamma = self._gamma(requests)
        outcome = self.speculator.round(self._batch(requests), gamma)
        tokens, counts = outcome.tokens.tolist(), outcome.counts.tolist()
        updates = []
        for id, active, row, count in zip(ids, requests, tokens, counts, strict=True):
            before = len(active.tokens)
            active.accepted.append(count - 1)
            active.proposed += gamma
            active.push(row[:count])
            if gamma and self.speculator.account(active.slot) is None:
                self.policy.observe(count - 1, gamma)
            self.speculator.commit(active.slot, active.length)
            updates.append(self._update(id, before))
        return updates

    def _gamma(self, requests: Sequence[ActiveRequest]) -> int:
        """The round's draft length: no row lies beyond the context's end.

        It is not cut to what the requests may still produce: a request's rounds, and with them what a sparse method
        selects, would then depend on its neighbours. Near the context's end, and with ``auto``, they do.
        """
        if self.pair.draft is None:
            return 0
        room = self.pair.context_limit - 1 - max(active.length for active in requests)
        return max(0, min(self.policy.choose(), room))

    def _batch(self, requests: Sequence[ActiveRequest]) -> Batch:
        device = self.speculator.target.device
        return Batch(
            slots=[active.slot for active in requests],
            lengths=[active.length for active in requests],
            recent=torch.tensor([active.recent for active in requests], device=device),
            # Counter 0 drew the first token, after the prefill.
            rounds=torch.tensor([len(active.accepted) + 1 for active in requests], device=device),
            sampling=SamplingState.of([active.request.sampling for active in requests], device),
        )

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
        target, draft = self.speculator.target, self.speculator.draft
        fractions = read_fractions(target.meter, draft.meter if draft else None, active.slot)
        prefill = (self.prefill.spec(), target.prefill_meter.fraction(active.slot))
        audit = self.audit.finish(active.slot, float(target.meter.full[active.slot])) if self.audit else None
        for runner in self._runners:
            runner.cache.free(active.slot)
        cycles = self.speculator.account(active.slot)
        return active.result(self.method.name, fractions, prefill, error, cycles, audit)


def _draft_cost(pair: Pair) -> float:
    """A draft step in target passes, by the weights' bytes: what decoding is bound by at short contexts."""
    if pair.draft is None:
        return 1.0
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (pair.draft, pair.target)]
    return sizes[0] / sizes[1]
