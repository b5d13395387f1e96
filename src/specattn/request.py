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
                "shorten the prompt (--prompt-tokens) or use a pair with a longer context"
            )


@dataclass
class CycleAccount:
    """What the cycles of a lossless request did: sparse rounds, and the dense pass that ends each cycle.

    Attributes:
        rounds: draft tokens that each sparse round accepted.
        drafted: draft tokens proposed in them.
        passes: dense passes.
        proposed, accepted: tokens that the dense passes checked, and those that they chose themselves.
    """

    rounds: list[int] = field(default_factory=list)
    drafted: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0

    def add_pass(self, proposed: int, accepted: int) -> None:
        """Count a dense pass."""
        self.passes += 1
        self.proposed += proposed
        self.accepted += accepted

    def report(self, delivered: int, kv_read_fraction: float) -> LosslessReport:
        """The figures of a request to which its cycles delivered ``delivered`` tokens."""
        reads = (self.passes + len(self.rounds)) * kv_read_fraction
        return LosslessReport(
            dense_passes=self.passes,
            proposed=self.proposed,
            accepted=self.accepted,
            acceptance_rate=self.accepted / self.proposed if self.proposed else 0.0,
            dense_reads_per_token=self.passes / delivered if delivered else 0.0,
            kv_reads_per_token=reads / delivered if delivered else 0.0,
        )


@dataclass(frozen=True)
class LosslessReport:
    """What dense verification did for a request, and what each of its tokens cost.

    Attributes:
        dense_passes: passes in which the target read everything.
        proposed, accepted: sparsely verified tokens that they checked, and those that stood.
        acceptance_rate: the ratio of the two.
        dense_reads_per_token: dense passes over delivered tokens; dense speculation has one over its tokens a round.
        kv_reads_per_token: what the target read in passes of both kinds, in full reads, over delivered tokens.
    """

    dense_passes: int
    proposed: int
    accepted: int
    acceptance_rate: float
    dense_reads_per_token: float
    kv_reads_per_token: float


@dataclass
class GenerationResult:
    """What a request got, and what it cost.

    Attributes:
        text, tokens: the generated text and its token ids (an end-of-sequence token included).
        finish_reason: ``stop`` (end token or stop string), ``length`` (the limit asked for or the context's end),
            ``interrupted`` or ``error``.
        accepted_per_round: draft tokens accepted in each round; in the lossless mode in each sparse one.
        acceptance_rate: accepted draft tokens over proposed ones.
        kv_read_fraction: bytes the target's attention read over those of dense attention.
        draft_read_fraction: bytes the draft's attention read, over the same.
        seconds: wall time of ``prefill`` and ``decode``.
        prefill: how the target read the prompt.
        prefill_computed: share of the causal query-key products that it computed to do so.
        audit: what an audit has found, if one was asked for.
        error: why the request failed, if it did.
        lossless: what the lossless mode did; ``None`` without it.
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
    lossless: LosslessReport | None = None
    audit: AuditReport | None = None


@dataclass
class ActiveRequest:
    """A request that holds a slot: its tokens so far and its account."""

    request: Request
    slot: int
    stream: TextStream
    eos: frozenset[int]
    """Tokens that end it."""
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
        for token in tokens[: self.limit - len(self.tokens)]:
            self.tokens.append(token)
            ended = token in self.eos
            if not ended:
                self.stream.push(token)
            if ended or self.stream.stopped:
                self.finish_reason = "stop"
                return
        if len(self.tokens) == self.limit:
            self.finish_reason = "length"

    def result(
        self,
        method: str,
        fractions: tuple[float, float],
        prefill: tuple[str, float],
        error: str | None = None,
        cycles: CycleAccount | None = None,
        audit: AuditReport | None = None,
    ) -> GenerationResult:
        """The account of a finished (or interrupted) request; ``prefill`` is the method and the share computed."""
        rounds, drafted = (
            (self.accepted, self.proposed) if cycles is None else (cycles.rounds, cycles.drafted)
        )
        decode = perf_counter() - self.decode_started if self.decode_started else 0.0
        decoded = max(0, len(self.tokens) - 1)
        return GenerationResult(
            text=self.stream.text,
            tokens=list(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            rounds=len(rounds),
            accepted_per_round=list(rounds),
            acceptance_rate=sum(rounds) / drafted if drafted else 0.0,
            kv_read_fraction=fractions[0],
            draft_read_fraction=fractions[1],
            seconds={**self.seconds, "decode": decode},
            tokens_per_second=decoded / decode if decode > 0 else 0.0,
            prompt_tokens=len(self.request.prompt),
            method=method,
            prefill=prefill[0],
            prefill_computed=prefill[1],
            error=error,
            lossless=cycles.report(decoded, fractions[0]) if cycles is not None else None,
            audit=audit,
        )
