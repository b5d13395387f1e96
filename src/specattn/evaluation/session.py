"""The models of an evaluation with a batch of documents in their caches, and the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.attention import Attend, DenseAttend, Step
from specattn.evaluation.documents import Document
from specattn.pairs import Pair
from specattn.prefill.base import PrefillMethod
from specattn.prefill.dense import Dense
from specattn.runner import ModelRunner
from specattn.selection.base import Method, Need
from specattn.stores.base import StoreSpec
from specattn.target_scores import TargetScores

Progress = Callable[[str, int], None]
"""Called with what is being done and how many tokens of it were just finished."""

REFERENCE_ROWS = 128
"""Rows of the dense reference that run at once."""


class Session:
    """The models with a batch of documents in their caches; all of them stand at the same position.

    The target's cache has the side stores of all methods. Each kind of side stores of the draft has a cache of its own:
    a draft makes its scores from what is beside its cache.

    Attributes:
        prefix: tokens of a document before the rows that are evaluated.
        names, slots, tokens: of the documents that were read; tokens ``[documents, context + 1]``.
        scores: what the prefix's last rows attend to, if any method wants to know.
        reference: dense logits ``[batch, rows, vocab]``; every batch writes to the same.
    """

    def __init__(
        self,
        pair: Pair,
        context: int,
        rows: int,
        gamma: int,
        batch: int,
        prefill: PrefillMethod,
        methods: Sequence[Method],
        progress: Progress | None,
    ) -> None:
        self.pair, self.context, self.rows, self.gamma = pair, context, rows, gamma
        self.prefix, self.prefill = context - rows, prefill
        self.progress = progress or (lambda what, count: None)
        self.batch = batch
        stores = dict.fromkeys(spec for method in methods for spec in method.stores)
        self.target = self.runner(pair.target, tuple(stores))
        self.drafts: dict[tuple[StoreSpec, ...], ModelRunner] = {}
        if pair.draft is not None:
            kinds = dict.fromkeys(method.draft_stores for method in methods)
            self.drafts = {kind: self.runner(pair.draft, kind) for kind in kinds}
        self.runners = [self.target, *self.drafts.values()]
        wanted = any(Need.SCORES in method.needs for method in methods)
        self.scores = TargetScores.of(self.target) if wanted else None
        self.reference: Tensor | None = None

    def runner(self, model: PreTrainedModel, stores: Sequence[StoreSpec] = ()) -> ModelRunner:
        """``model`` with a cache in which every slot has room for a document."""
        room, batch = self.context + self.gamma + 1, self.batch
        runner = ModelRunner(model, tokens=batch * room, slots=batch, max_length=room, stores=stores)
        for _ in range(batch):
            runner.cache.allocate(room)
        return runner

    def read(self, documents: Sequence[Document]) -> None:
        """Fill the caches with the documents' prefixes and compute the dense reference."""
        self.names = [document.name for document in documents]
        self.slots = list(range(len(documents)))
        tokens = [document.tokens[: self.context + 1] for document in documents]
        self.tokens = torch.tensor(tokens, device=self.target.device)
        self.rewind(0)
        for slot, (name, document) in enumerate(zip(self.names, tokens, strict=True)):
            self._read_prefix(slot, document, f"{name}: target prefill", None)
            for draft in self.drafts.values():
                report = partial(self.progress, f"{name}: draft prefill")
                draft.prefill(slot, document[: self.prefix], progress=report)
        for start in range(self.prefix, self.context, REFERENCE_ROWS):
            count = min(REFERENCE_ROWS, self.context - start)
            step = self.step(self.target, start, count, DenseAttend())
            self._keep(self.logits(self.target, step, start, count), start - self.prefix)
            self.progress(f"{self.label}: dense reference", count)
        self.rewind(self.prefix)
        self._prefill_again(tokens)

    def rewind(self, length: int) -> None:
        """Let all caches end after ``length`` tokens."""
        for runner in self.runners:
            for slot in self.slots:
                runner.cache.set_length(slot, length)

    @property
    def label(self) -> str:
        """What progress calls the documents."""
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} documents"

    def step(
        self, runner: ModelRunner, start: int, count: int, attend: Attend, *, metered: bool = False
    ) -> Step:
        """A pass of ``count`` rows of every document, from position ``start`` on."""
        return runner.step(self.slots, [start] * len(self.slots), count, attend, metered=metered)

    def logits(self, target: ModelRunner, step: Step, start: int, count: int) -> Tensor:
        """What ``target`` says ``[documents, count, vocab]`` in such a pass over the documents' tokens."""
        logits = target.forward(step, self.tokens[:, start : start + count], count)
        return logits[..., : self.pair.vocab_size]

    def _keep(self, logits: Tensor, first: int) -> None:
        """Write the reference's rows from ``first`` on to their place: they are too large to be held twice."""
        if self.reference is None:
            self.reference = logits.new_empty(self.batch, self.rows, logits.shape[-1])
        self.reference[: len(logits), first : first + logits.shape[1]] = logits

    def _prefill_again(self, documents: Sequence[Sequence[int]]) -> None:
        """Let the target read the prefixes as the methods will find them; the reference has been taken."""
        for slot, (name, document) in enumerate(zip(self.names, documents, strict=True)):
            self.target.prefill_meter.reset(slot)
            if not isinstance(self.prefill, Dense):
                self.target.cache.set_length(slot, 0)
                self._read_prefix(slot, document, f"{name}: {self.prefill.name} prefill", self.prefill)

    def _read_prefix(
        self, slot: int, document: Sequence[int], label: str, method: PrefillMethod | None
    ) -> None:
        """Let the target read a prefix, and keep what its last rows attend to if any method wants to know."""
        prefix, report = document[: self.prefix], partial(self.progress, label)
        if self.scores is not None:
            self.scores.prefill(self.target, slot, prefix, method=method, progress=report)
        else:
            self.target.prefill(slot, prefix, method=method, progress=report)
