"""Rounds on the fast path, behind the interface of :class:`specattn.speculation.Speculator`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.fast import decoder, selector
from specattn.fast.landing import HostLanding, PinnedLanding, Run
from specattn.fast.model import FastModel
from specattn.fast.operations import Operations
from specattn.fast.requests import READS, Requests, upload
from specattn.fast.round import FastRound
from specattn.fast.sparse_draft import DraftMemory
from specattn.landed import Landed
from specattn.plan import draft_steps
from specattn.sampling import SamplingParams, SamplingState
from specattn.selection.base import Method
from specattn.speculation import Batch, Outcome, Speculator

Landing = PinnedLanding | HostLanding


def unsupported(method: Method, models: Sequence[PreTrainedModel], *, lossless: bool = False) -> str | None:
    """Why these models and this method cannot take the fast path; ``None`` if they can."""
    reasons = [selector.unsupported(method, lossless=lossless)]
    for model in models:
        reasons += [decoder.unsupported(model), decoder.lacks_kernels(model)]
    return next(filter(None, reasons), None)


class Work(Protocol):
    """What one launch does for the requests in ``slots``."""

    slots: Tensor

    def run(self) -> Tensor:
        """Do it, and report."""


@dataclass
class Shared:
    """What all variants of a speculator have in common.

    Attributes:
        target, draft: the merged models.
        requests: where requests stand.
        memory: of the graphs; ``None`` where rounds are not captured.
        attended: what a sparse draft's lists are made from, once there is one.
    """

    target: FastModel
    draft: FastModel | None
    requests: Requests
    memory: Any | None
    attended: DraftMemory | None = None

    @classmethod
    def of(cls, speculator: Speculator, operations: Operations | None) -> Shared:
        """For the models of ``speculator``, which are merged."""
        draft, vocab_size = speculator.draft, speculator.vocab_size
        return cls.between(
            FastModel.of(speculator.target, vocab_size, operations),
            None if draft is None else FastModel.of(draft, vocab_size, operations),
        )

    @classmethod
    def between(cls, target: FastModel, draft: FastModel | None) -> Shared:
        """For models that are merged already."""
        runner = target.runner
        captured = runner.device.type == "cuda" and target.decoder.operations.captured
        meters = [model.runner.meter for model in (target, draft) if model is not None]
        return cls(
            target,
            draft,
            Requests(runner.cache.spare_slot, runner.device, meters),
            torch.cuda.graph_pool_handle() if captured else None,
        )


@dataclass
class Ready:
    """A round of one shape, ready to run.

    Attributes:
        slots: whose round it is; ``padding`` behind them.
        landings: places of reports, in turn: one is read while the next round writes another.
        first: what is to run before the first of several rounds, if anything is.
    """

    slots: Tensor
    padding: int
    run: Run
    landings: Iterator[Landing]
    first: Run | None = None
    _held: tuple[int, ...] = ()

    def assign(self, slots: Sequence[int]) -> None:
        """Say whose round the next is; costs nothing if it is theirs already."""
        if self._held != tuple(slots):
            self._held = tuple(slots)
            padded = [*slots, *[self.padding] * (len(self.slots) - len(slots))]
            self.slots.copy_(upload(padded, self.slots.device))


def shape_of(requests: int, rows: int, sampling: SamplingState) -> tuple[int, int, bool, int, bool]:
    """What a graph is captured for: the padded batch, the rows, and what the sampling asks of the host."""
    padded = 1 << (requests - 1).bit_length()
    return padded, rows, sampling.sampled, sampling.max_top_k, sampling.uses_top_p


class FastSpeculator(Speculator):
    """Runs whole rounds on the device: as CUDA graphs on a GPU, operation by operation elsewhere.

    Batches of other sizes than powers of two are padded. What is captured depends on the padded size, on gamma and on
    what the sampling asks of the host, and is captured when it is first needed.

    Requests are taken in once by :meth:`enter`; from then on :meth:`launch` runs their rounds one after the other, and
    none of them waits for the host to have read the last. :meth:`round` does both at once.

    Args:
        slow: the speculator whose place it takes.
        operations: what rounds are made of; what suits the device if ``None``.
    """

    def __init__(
        self, slow: Speculator, operations: Operations | None = None, *, shared: Shared | None = None
    ) -> None:
        super().__init__(slow.target, slow.draft, slow.method, slow.mapping, slow.vocab_size, slow.observer)
        self.scores = slow.scores
        self._shared = shared or Shared.of(slow, operations)
        self._rounds: dict[tuple[object, ...], Ready] = {}

    def variant(self, *, drafting: bool, sparse: bool) -> Speculator:
        """See :meth:`specattn.speculation.Speculator.variant`; requests stand where they stand for this one."""
        slow = super().variant(drafting=drafting, sparse=sparse)
        return self if slow is self else FastSpeculator(slow, shared=self._shared)

    def enter(self, batch: Batch) -> None:
        """Take requests in, or tell the device again where they stand."""
        self._shared.requests.enter(batch)
        if self._shared.attended is not None:
            self._shared.attended.forget(batch.slots)

    @torch.inference_mode()
    def launch(self, slots: Sequence[int], gamma: int, sampling: SamplingState) -> Callable[[], Landed]:
        """Start the next round of the requests in ``slots``; what is returned waits for it.

        No more than two rounds may be under way. Of ``sampling`` only what it tells the host is used.
        """
        ready = self._ready(len(slots), gamma, sampling)
        self._remember(slots, gamma)
        ready.assign(slots)
        landing, requests = next(ready.landings), len(slots)
        landing.launch(ready.run)
        return lambda: landing.land(requests)

    @torch.inference_mode()
    def prepare(self, requests: int, gamma: int) -> None:
        """Have greedy rounds of so many requests ready before the first of them is launched."""
        sampling = SamplingState.of([SamplingParams()] * requests, self.target.device)
        self._ready(requests, gamma, sampling)

    @torch.inference_mode()
    def round(self, batch: Batch, gamma: int) -> Outcome:
        """One round, see :meth:`specattn.speculation.Speculator.round`."""
        ready, count = self._ready(len(batch.slots), gamma, batch.sampling), len(batch.slots)
        self.enter(batch)
        self._remember(batch.slots, gamma)
        ready.assign(batch.slots)
        report = ready.run()[:count]
        return Outcome(report[:, : gamma + 1], report[:, gamma + 1])

    def _remember(self, slots: Sequence[int], gamma: int) -> None:
        """Before a round: only a sparse draft's leave what the next one's lists are made from."""
        if self._shared.attended is not None:
            if self._drafts_sparsely(gamma):
                self._shared.attended.prepare(slots, draft_steps(self.method, gamma))
            else:
                self._shared.attended.forget(slots)

    def _drafts_sparsely(self, gamma: int) -> bool:
        return bool(gamma) and self.draft is not None and self.method.draft_p < 1

    def _ready(self, requests: int, gamma: int, sampling: SamplingState) -> Ready:
        padded, *_ = key = shape_of(requests, gamma, sampling)
        if key not in self._rounds:
            self._rounds[key] = self._build(padded, gamma, sampling)
        return self._rounds[key]

    def _build(self, batch: int, gamma: int, sampling: SamplingState) -> Ready:
        cache, shared = self.target.cache, self._shared
        length = cache.block_table.shape[1] * cache.page_size
        if self._drafts_sparsely(gamma) and shared.attended is None:
            assert shared.draft is not None
            shared.attended = DraftMemory(shared.draft, length)
        round = self._make(
            shared.target,
            None if self.draft is None else shared.draft,
            self.method,
            self.mapping,
            shared.requests,
            batch=batch,
            gamma=gamma,
            sampling=sampling,
            length=length,
            memory=shared.attended,
        )
        return self._prepare(round, batch, self._width(gamma))

    def _make(self, *parts: Any, **shape: Any) -> FastRound:
        return FastRound(*parts, **shape)

    def _width(self, gamma: int) -> int:
        """Columns of a round's report."""
        return gamma + 2 + READS

    def _prepare(self, work: Work, batch: int, width: int) -> Ready:
        """``work`` as it will run, with places for its reports."""
        landings: Sequence[Landing] = [HostLanding() for _ in range(2)]
        if self.target.device.type == "cuda":
            landings = [PinnedLanding(batch, width) for _ in range(2)]
        run = self._captured(work.run)
        return Ready(work.slots, self._shared.requests.padding, run, itertools.cycle(landings))

    def _captured(self, run: Run) -> Run:
        """``run`` as a graph, where there are graphs."""
        if self._shared.memory is None:
            return run
        from specattn.fast.graph import CapturedRound

        return CapturedRound(run, self._shared.memory)
