"""Fidelity: how far sparse decoding strays from dense decoding, token by token, on real text.

The context but for its last rows is read densely; the rows are decoded with the method in rounds of gamma + 1, fed with
the text itself. The draft's attention comes from the same tokens, as in a round that is accepted whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.accounting import ReadMeter, read_fractions
from specattn.attention import (
    Attend,
    DenseAttend,
    ExportAttend,
    LayerCall,
    SelectionObserver,
    Step,
    attached,
)
from specattn.draft_attention import DraftAttention
from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.attention_mass import AttentionMass, Breakdown
from specattn.evaluation.documents import Document
from specattn.evaluation.evicted_mass import EvictedMass
from specattn.eviction import Eviction
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.memory import shortage
from specattn.pairs import FoundPair, Pair
from specattn.prefill.base import PrefillMethod
from specattn.prefill.dense import Dense
from specattn.prefill.registry import resolve_prefill
from specattn.runner import ModelRunner
from specattn.selection.base import Method, Need, Selection
from specattn.selection.checks import check_at_least
from specattn.selection.eviction import Evicting, check_prefill
from specattn.speculation import Speculator
from specattn.stores.base import StoreSpec
from specattn.target_scores import TargetScores

Progress = Callable[[str, int], None]
"""Called with what is being done and how many tokens of it were just finished."""

REFERENCE_ROWS = 128
"""Rows of the dense reference that run at once."""


@dataclass(frozen=True)
class Detail:
    """What lies behind the means of a result.

    Attributes:
        kl: of each round, the mean over its rows.
        nll_change: of each round, how much the mean negative log-likelihood is above the dense model's, nats.
        breakdown: attention mass and density by layer and KV head.
    """

    kl: tuple[float, ...]
    nll_change: tuple[float, ...]
    breakdown: Breakdown


@dataclass(frozen=True)
class FidelityResult:
    """One method on one document. Means over the evaluated rows.

    Attributes:
        kl: KL(dense || sparse) of the next-token distributions, nats a token.
        total_variation: half the L1 distance of the distributions; a rejection step by the dense target would
            accept one minus this share of the tokens.
        top1_agreement: share of rows with the same most likely token.
        perplexity, perplexity_dense: of the text's own next tokens.
        attention_mass: share of the dense attention mass that the selected tokens hold, over sparse layers.
        kv_read_fraction, draft_read_fraction: see :func:`specattn.accounting.read_fractions`.
        prefill: how the target read the context before the rows.
        prefill_computed: share of the causal query-key products that it computed to do so.
        detail: what lies behind the means.
    """

    method: str
    options: dict[str, object]
    document: str
    kl: float
    total_variation: float
    top1_agreement: float
    perplexity: float
    perplexity_dense: float
    attention_mass: float
    kv_read_fraction: float
    draft_read_fraction: float
    prefill: str = "dense"
    prefill_computed: float = 1.0
    detail: Detail | None = field(default=None, repr=False)


def evaluate(
    pair: Pair,
    documents: Sequence[Document],
    methods: Sequence[Method],
    *,
    context: int,
    rows: int,
    gamma: int = 4,
    mapping: Mapping | None = None,
    prefill: PrefillMethod | str = "dense",
    batch: int = 8,
    progress: Progress | None = None,
    observer: SelectionObserver | None = None,
) -> Iterator[FidelityResult]:
    """Evaluate every method on every document; results come as they are ready.

    Args:
        documents: at least ``context + 1`` tokens each.
        context: tokens of text; the last ``rows`` of them are decoded with the method.
        gamma: rounds have ``gamma + 1`` rows.
        prefill: how the target reads the context before the rows that are decoded with a method. The reference
            is read densely.
        batch: documents that are decoded at once.
        observer: sees the selections of all sparse layers; results are ready after it has seen theirs.

    Raises:
        UsageError: if the figures do not fit each other or the models, before any work.
        CacheFullError: if a batch of documents does not fit in memory, or what is worked out from it.
    """
    check_protocol(pair, context, rows, gamma)
    if not documents:
        raise UsageError("no document to evaluate; give at least one")
    check_at_least("evaluate", "batch", batch, 1)
    for document in documents:
        if len(document.tokens) <= context:
            raise UsageError(
                f"document {document.name!r} has {len(document.tokens):,} tokens and {context + 1:,} are needed; "
                "use a longer one or a shorter context"
            )
    resolved = [resolve_mapping(pair, method, mapping) for method in methods]
    mappings = [None if found is None else found.to(pair.device) for found in resolved]
    prefill = resolve_prefill(prefill, pair.target.config)
    for method in methods:
        check_prefill(method, prefill)
    batch = min(batch, len(documents))
    fitting = partial(_fitting, pair.device, context, rows, batch)
    with fitting():
        session = _Session(pair, context, rows, gamma, batch, prefill, methods, progress)
        if any(Need.SCORES in method.needs for method in methods):
            session.scores = TargetScores.of(session.target)
    session.observer = observer
    for first in range(0, len(documents), batch):
        with fitting(), attached(*pair.models), torch.inference_mode():
            session.read(documents[first : first + batch])
        for method, found in zip(methods, mappings, strict=True):
            with fitting(), attached(*pair.models), torch.inference_mode():
                results = session.run(method, found)
            # Outside the block: the caller finds the models as they were.
            yield from results


def check_protocol(pair: Pair | FoundPair, context: int, rows: int, gamma: int) -> None:
    """Refuse an evaluation that cannot run.

    Raises:
        UsageError: naming the value.
    """
    if gamma < 1:
        raise UsageError(f"gamma={gamma} must be at least 1")
    if not 1 <= rows < context:
        raise UsageError(f"rows={rows} must be at least 1 and below context={context}")
    if context > pair.context_limit:
        raise UsageError(
            f"context={context:,} is beyond the models' limit of {pair.context_limit:,}; "
            "use a shorter context, or load them with yarn"
        )


@contextmanager
def _fitting(device: torch.device, context: int, rows: int, batch: int) -> Iterator[None]:
    """Say what needs less where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fewer = "fewer documents at once (--batch), " if batch > 1 else ""
        raise CacheFullError(
            f"{device} has not enough memory for batch={batch}, context={context:,} and rows={rows:,}: "
            f"{shortage(error)}. Evaluate {fewer}a shorter context (--context) or fewer rows (--rows)"
        ) from error


class _Session:
    """The models with a batch of documents in their caches; all of them stand at the same position.

    The target's cache has the side stores of all methods. Each kind of side stores of the draft has a cache of its own:
    a draft makes its scores from what is beside its cache.
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
        self.observer: SelectionObserver | None = None
        self.batch = batch
        stores = dict.fromkeys(spec for method in methods for spec in method.stores)
        self.target = self._runner(pair.target, tuple(stores))
        self.drafts: dict[tuple[StoreSpec, ...], ModelRunner] = {}
        if pair.draft is not None:
            kinds = dict.fromkeys(method.draft_stores for method in methods)
            self.drafts = {kind: self._runner(pair.draft, kind) for kind in kinds}
        self.runners = [self.target, *self.drafts.values()]
        self.scores: TargetScores | None = None
        # Dense logits [batch, rows, vocab]; every batch writes to the same.
        self.reference: Tensor | None = None

    def _runner(self, model: PreTrainedModel, stores: Sequence[StoreSpec] = ()) -> ModelRunner:
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
        self._rewind(0)
        for slot, (name, document) in enumerate(zip(self.names, tokens, strict=True)):
            self._read_prefix(slot, document, f"{name}: target prefill", None)
            for draft in self.drafts.values():
                report = partial(self.progress, f"{name}: draft prefill")
                draft.prefill(slot, document[: self.prefix], progress=report)
        for start in range(self.prefix, self.context, REFERENCE_ROWS):
            count = min(REFERENCE_ROWS, self.context - start)
            step = self._step(self.target, start, count, DenseAttend())
            self._keep(self._logits(self.target, step, start, count), start - self.prefix)
            self.progress(f"{self._label}: dense reference", count)
        self._rewind(self.prefix)
        self._prefill_again(tokens)

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

    def run(self, method: Method, mapping: Mapping | None) -> list[FidelityResult]:
        """Decode the rows with ``method`` and compare; the caches are left as they were."""
        mass = AttentionMass()
        target = self._copy(method) if isinstance(method, Evicting) else self.target
        draft = self.drafts.get(method.draft_stores)
        speculator = Speculator(target, draft, method, mapping, self.pair.vocab_size, self._observing(mass))
        for runner in (target, *self.drafts.values()):
            for slot in self.slots:
                runner.meter.reset(slot)
        if speculator.scores is not None and self.scores is not None:
            speculator.scores.copy(self.scores)
        if speculator.eviction is not None:
            self._evict(speculator.eviction, mass)
        sums: list[Tensor] = []
        for start in range(self.prefix, self.context, self.gamma + 1):
            count = min(self.gamma + 1, self.context - start)
            sums.append(self._compare(start, self._decode(speculator, start, count)))
            for slot in self.slots:
                speculator.commit(slot, start + count)
            self.progress(f"{self._label}: {method.name}", count)
        self._rewind(self.prefix)
        rounds = torch.stack(sums, dim=1).cpu()  # [batch, rounds, figures]
        meters = target.meter, draft.meter if draft else None
        return [
            self._result(method, slot, rounds[slot], mass, read_fractions(*meters, slot))
            for slot in self.slots
        ]

    def _observing(self, mass: AttentionMass) -> SelectionObserver:
        """``mass``, and the caller's observer if there is one."""
        other = self.observer
        if other is None:
            return mass

        def both(step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
            mass(step, call, selection, output)
            other(step, call, selection, output)

        return both

    def _copy(self, method: Evicting) -> ModelRunner:
        """A target with a cache of its own to evict from: it holds what of the prefix ``method`` need not observe."""
        runner = self._runner(self.pair.target)
        held = min(self.prefix - method.observed(self.prefix), self.prefix - 1)
        geometry, device = runner.geometry, runner.device
        tokens = torch.arange(held, device=device).expand(geometry.layers, geometry.kv_heads, -1)
        for slot in self.slots:
            runner.cache.copy(slot, self.target.cache, slot, tokens)
        return runner

    def _evict(self, eviction: Eviction, mass: AttentionMass) -> None:
        """Read the rest of the prefix and drop what is not kept of it."""
        for slot, name in zip(self.slots, self.names, strict=True):
            report = partial(self.progress, f"{name}: {eviction.method.name} prefill")
            report(eviction.target.cache.length(slot))
            eviction.prefill(slot, self.tokens[slot, : self.prefix].tolist(), progress=report)
        eviction.attend = EvictedMass(eviction.attend, self.target.cache, mass.add)

    @property
    def _label(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} documents"

    def _step(
        self, runner: ModelRunner, start: int, count: int, attend: Attend, *, metered: bool = False
    ) -> Step:
        return runner.step(self.slots, [start] * len(self.slots), count, attend, metered=metered)

    def _decode(self, speculator: Speculator, start: int, count: int) -> Tensor:
        """The sparse logits ``[batch, count, vocab]`` of one round."""
        lengths = [start] * len(self.slots)
        export = self._draft_rows(speculator, start, count - 1)
        attend = speculator.sparse_attend(self.slots, lengths, count, export)
        step = self._step(speculator.target, start, count, attend, metered=True)
        return self._logits(speculator.target, step, start, count)

    def _draft_rows(self, speculator: Speculator, start: int, steps: int) -> DraftAttention | None:
        """The draft's attention in ``steps`` steps from position ``start`` on, in one pass over the known tokens.

        One more if the method wants every row.
        """
        export, draft = speculator.export([start] * len(self.slots), steps), speculator.draft
        if export is None or draft is None:
            return None
        steps = export.rows
        attend = _StepwiseExport(export, 0, steps)
        step = self._step(draft, start - 1, steps + 1, attend, metered=True)
        draft.forward(step, self.tokens[:, start - 1 : start + steps], 1)
        return export

    def _logits(self, target: ModelRunner, step: Step, start: int, count: int) -> Tensor:
        logits = target.forward(step, self.tokens[:, start : start + count], count)
        return logits[..., : self.pair.vocab_size]

    def _compare(self, start: int, logits: Tensor) -> Tensor:
        """Sums over the rows of each document: KL, total variation, agreement, both negative log likelihoods."""
        assert self.reference is not None, "the documents were read"
        first, count = start - self.prefix, logits.shape[1]
        following = self.tokens[:, start + 1 : start + count + 1]
        figures = [
            _figures(dense, sparse, after)
            for dense, sparse, after in zip(
                self.reference[: len(logits), first : first + count], logits, following, strict=True
            )
        ]
        return torch.stack(figures)

    def _result(
        self, method: Method, slot: int, sums: Tensor, mass: AttentionMass, fractions: tuple[float, float]
    ) -> FidelityResult:
        """The result from the sums of each round, ``[rounds, figures]``."""
        kl, variation, agreement, nll, nll_dense = (sums.sum(0) / self.rows).tolist()
        return FidelityResult(
            method=method.name,
            options=method.options(),
            document=self.names[slot],
            kl=kl,
            total_variation=variation,
            top1_agreement=agreement,
            perplexity=math.exp(nll),
            perplexity_dense=math.exp(nll_dense),
            attention_mass=mass.mean(slot),
            kv_read_fraction=fractions[0],
            draft_read_fraction=fractions[1],
            prefill=self.prefill.spec(),
            prefill_computed=self.target.prefill_meter.fraction(slot),
            detail=self._detail(sums, mass.breakdown(slot)),
        )

    def _detail(self, sums: Tensor, breakdown: Breakdown) -> Detail:
        counts = torch.full((len(sums),), self.gamma + 1)
        counts[-1] = self.rows - (len(sums) - 1) * (self.gamma + 1)
        means = sums / counts[:, None]
        kl, nll_change = means[:, 0].tolist(), (means[:, 3] - means[:, 4]).tolist()
        return Detail(tuple(kl), tuple(nll_change), breakdown)

    def _rewind(self, length: int) -> None:
        for runner in self.runners:
            for slot in self.slots:
                runner.cache.set_length(slot, length)


def _figures(dense: Tensor, sparse: Tensor, following: Tensor) -> Tensor:
    """The five sums of :meth:`_Session._compare` for logits ``[rows, vocab]`` and the next tokens ``[rows]``."""
    # In float32 the rounding of the logarithms alone may make a divergence negative.
    dense, sparse = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    return torch.stack(
        [
            (dense.exp() * (dense - sparse)).sum(),
            (dense.exp() - sparse.exp()).abs().sum() / 2,
            (dense.argmax(-1) == sparse.argmax(-1)).sum(),
            -sparse.gather(1, following[:, None]).sum(),
            -dense.gather(1, following[:, None]).sum(),
        ]
    )


class _StepwiseExport(ExportAttend):
    """One pass over many rows that counts the bytes of decoding: two tokens in the first step, then one a step."""

    def count(self, step: Step, call: LayerCall, meter: ReadMeter) -> None:
        meter.add_dense(step.slots, step.positions[:, :2], call.window)
        for row in range(2, step.positions.shape[1]):
            meter.add_dense(step.slots, step.positions[:, row : row + 1], call.window)
