"""Admission: requests wait until both caches have room for them, get a slot, and have their prompts read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter

import torch

from specattn.audit import Audit
from specattn.errors import CacheFullError
from specattn.lossless import LosslessSpeculator
from specattn.pairs import Pair
from specattn.prefill.base import PrefillMethod
from specattn.request import ActiveRequest, Request
from specattn.runner import ModelRunner
from specattn.sampling import SamplingState, Stream, sample, uniform, warp
from specattn.speculation import Speculator
from specattn.text import TextStream

Progress = Callable[[str, int], None]
"""Called with a model's role, ``target`` or ``draft``, and the prompt tokens that it has just read."""


class Admission:
    """The requests that wait, in the order in which they came, and how the first of them comes in.

    Args:
        speculator: the models and their caches.
        prefill: how the target reads prompts.
        slack: tokens that a request needs room for beyond those of its own.
        audit: is told of each request that comes in.
        progress: is told of the prompts' tokens as they are read.
    """

    def __init__(
        self,
        pair: Pair,
        speculator: Speculator | LosslessSpeculator,
        prefill: PrefillMethod,
        *,
        slack: int,
        audit: Audit | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.pair, self.speculator, self.prefill = pair, speculator, prefill
        self.slack, self.audit, self.progress = slack, audit, progress
        self.waiting: deque[tuple[int, Request]] = deque()
        self._next_id = 0

    @property
    def runners(self) -> list[ModelRunner]:
        """The target, and the draft if there is one: a request has the same slot in the caches of both."""
        draft = self.speculator.draft
        return [self.speculator.target] + ([draft] if draft is not None else [])

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
        self.waiting.append((self._next_id, request))
        return self._next_id

    def withdraw(self, id: int) -> None:
        """Let a request wait no longer."""
        self.waiting = deque(item for item in self.waiting if item[0] != id)

    def open(self) -> tuple[int, ActiveRequest] | None:
        """The number of the request that came first, and the request with its slot; ``None`` if there is no room."""
        if not self.waiting or not self._fits(self.waiting[0][1]):
            return None
        id, request = self.waiting.popleft()
        slots = [runner.cache.allocate(self._room(request)) for runner in self.runners]
        assert len(set(slots)) == 1, "both caches hold the same requests"
        for runner in self.runners:
            runner.meter.reset(slots[0])
            runner.prefill_meter.reset(slots[0])
        if self.audit is not None:
            self.audit.begin(slots[0], request.sampling.seed)
        limit = min(request.max_new_tokens, self.pair.context_limit - len(request.prompt))
        stream = TextStream(self.pair.tokenizer, request.stop)
        eos = frozenset[int]() if request.ignore_eos else self.pair.eos_token_ids
        return id, ActiveRequest(request, slots[0], stream, eos, limit)

    def read(self, active: ActiveRequest) -> None:
        """Let both models read the prompt, and draw the first token."""
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

    def _fits(self, request: Request) -> bool:
        # An evicting method leaves more room in the target's cache than in the draft's.
        return all(runner.cache.fits(self._room(request)) for runner in self.runners)

    def _room(self, request: Request) -> int:
        """Tokens that the caches reserve: as many as the request can ever have."""
        longest = min(len(request.prompt) + request.max_new_tokens, self.pair.context_limit)
        return longest + self.slack

    def _report(self, role: str) -> Callable[[int], None] | None:
        progress = self.progress
        return (lambda count: progress(role, count)) if progress else None
