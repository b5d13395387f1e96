"""A request, from admission to its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from specattn.audit import AuditReport
from specattn.errors import UsageError
from specattn.sampling import SamplingParams
from specattn.text import TextStream


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: tokens to generate at most.
        sampling: how tokens are drawn.
        stop: strings at which generation ends.
        ignore_eos: go on after an end-of-sequence token (benchmarks).
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def check(self, context_limit: int, vocab_size: int | None = None) -> None:
        """Refuse what cannot be served by models of ``context_limit`` tokens that know ``vocab_size`` token ids.

        Raises:
            UsageError: naming the value and the remedy.
        """
        if not self.prompt:
            raise UsageError("the prompt is empty; give at least one token of text")
        if vocab_size is not None and not 0 <= min(self.prompt) <= max(self.prompt) < vocab_size:
            raise UsageError(
                f"the prompt holds token ids from {min(self.prompt)} to {max(self.prompt)} and the models know 0 to "
                f"{vocab_size - 1}; encode it with the pair's own tokenizer"
            )
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if any(not stop for stop in self.stop):
            raise UsageError("a stop string is empty; leave it out")
        if len(self.prompt) >= context_limit:
            raise UsageError(
                f"the prompt has {len(self.prompt):,} tokens and the models' context ends at {context_limit:,}; "
                "shorten the prompt or use a pair with a longer context"
            )


@dataclass
class GenerationResult:
    """What a request got, and what it cost.

    Attributes:
        text, tokens: the generated text and its token ids (an end-of-sequence token included).
        finish_reason: ``stop`` (end token or stop string), ``length`` (the limit asked for or the context's end),
            ``interrupted`` or ``error``.
        accepted_per_round: draft tokens accepted in each round.
        acceptance_rate: accepted draft tokens over proposed ones.
        kv_read_fraction: bytes the target's attention read over those of dense attention.
        draft_read_fraction: bytes the draft's attention read, over the same.
        seconds: wall time of ``prefill`` and ``decode``.
        prefill: how the target read the prompt.
        prefill_computed: share of the causal query-key products that it computed to do so.
        audit: what an audit has found, if one was asked for.
        error: why the request failed, if it did.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    rounds: int
    accepted_per_round: list[int]
    acceptance_rate: float
    kv_read_fraction: float
    draft_read_fraction: float
    seconds: dict[str, float]
    tokens_per_second: float
    prompt_tokens: int
    method: str
    prefill: str
    prefill_computed: float
    error: str | None = None
    audit: AuditReport | None = None


@dataclass
class ActiveRequest:
    """A request that holds a slot: its tokens so far and its account."""

    request: Request
    slot: int
    stream: TextStream
    eos: frozenset[int]
    limit: int
    """Tokens it may generate: what was asked for, or what the context leaves."""
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    proposed: int = 0
    reads: Sequence[float] = (0.0, 0.0, 0.0)
    """Bytes that the target read, that it would have read in full, and that the draft read."""
    finish_reason: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    decode_started: float = 0.0

    @property
    def length(self) -> int:
        """n: tokens in the target's cache; the last token generated is pending."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def text(self) -> list[int]:
        """The prompt and what follows it."""
        return [*self.request.prompt, *self.tokens]

    @property
    def recent(self) -> tuple[int, int]:
        """The previous and the pending token."""
        previous = self.tokens[-2] if len(self.tokens) > 1 else self.request.prompt[-1]
        return previous, self.tokens[-1]

    def push(self, tokens: Sequence[int]) -> None:
        """Take new tokens until one of them ends the request; the rest is dropped."""
        for token in tokens:
            self.tokens.append(token)
            if token in self.eos and not self.request.ignore_eos:
                self.finish_reason = "stop"
            else:
                self.stream.push(token)
                if self.stream.stopped:
                    self.finish_reason = "stop"
                elif len(self.tokens) >= self.limit:
                    self.finish_reason = "length"
            if self.finish_reason:
                return

    def result(
        self,
        method: str,
        fractions: tuple[float, float],
        prefill: tuple[str, float],
        error: str | None = None,
        audit: AuditReport | None = None,
    ) -> GenerationResult:
        """The account of a finished (or interrupted) request; ``prefill`` is the method and the share computed."""
        decode = perf_counter() - self.decode_started if self.decode_started else 0.0
        decoded = max(0, len(self.tokens) - 1)
        return GenerationResult(
            text=self.stream.text,
            tokens=list(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            rounds=len(self.accepted),
            accepted_per_round=list(self.accepted),
            acceptance_rate=sum(self.accepted) / self.proposed if self.proposed else 0.0,
            kv_read_fraction=fractions[0],
            draft_read_fraction=fractions[1],
            seconds={**self.seconds, "decode": decode},
            tokens_per_second=decoded / decode if decode > 0 else 0.0,
            prompt_tokens=len(self.request.prompt),
            method=method,
            prefill=prefill[0],
            prefill_computed=prefill[1],
            error=error,
            audit=audit,
        )
