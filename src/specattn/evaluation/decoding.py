"""One method decodes the rows of a session's documents, in rounds that are fed with the text itself."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from specattn.accounting import ReadMeter, read_fractions
from specattn.attention import ExportAttend, LayerCall, SelectionObserver, Step
from specattn.draft_attention import DraftAttention
from specattn.evaluation.attention_mass import AttentionMass, Breakdown
from specattn.evaluation.divergence import Detail, FidelityResult, row_sums
from specattn.evaluation.evicted_mass import EvictedMass
from specattn.evaluation.session import Session
from specattn.eviction import Eviction
from specattn.mapping.artifact import Mapping
from specattn.runner import ModelRunner
from specattn.selection.base import Method, Selection
from specattn.selection.eviction import Evicting
from specattn.speculation import Speculator


class Decoding:
    """``method`` on the documents that ``session`` has read.

    Args:
        observer: sees the selections of all sparse layers.
    """

    def __init__(
        self,
        session: Session,
        method: Method,
        mapping: Mapping | None,
        observer: SelectionObserver | None = None,
    ) -> None:
        self.session, self.method = session, method
        self.mass = AttentionMass()
        target = self._copy(method) if isinstance(method, Evicting) else session.target
        draft = session.drafts.get(method.draft_stores)
        observing = _both(self.mass, observer)
        self.speculator = Speculator(target, draft, method, mapping, session.pair.vocab_size, observing)

    def run(self) -> list[FidelityResult]:
        """Decode the rows and compare; the session's caches are left as they were."""
        session, speculator = self.session, self.speculator
        for runner in (speculator.target, *session.drafts.values()):
            for slot in session.slots:
                runner.meter.reset(slot)
        if speculator.scores is not None and session.scores is not None:
            speculator.scores.copy(session.scores)
        if speculator.eviction is not None:
            self._evict(speculator.eviction)
        sums: list[Tensor] = []
        for start in range(session.prefix, session.context, session.gamma + 1):
            count = min(session.gamma + 1, session.context - start)
            sums.append(self._compare(start, self._decode(start, count)))
            for slot in session.slots:
                speculator.commit(slot, start + count)
            session.progress(f"{session.label}: {self.method.name}", count)
        session.rewind(session.prefix)
        rounds = torch.stack(sums, dim=1).cpu()  # [batch, rounds, figures]
        return [self._result(slot, rounds[slot]) for slot in session.slots]

    def _copy(self, method: Evicting) -> ModelRunner:
        """A target with a cache of its own to evict from: it holds what of the prefix ``method`` need not observe."""
        session = self.session
        runner = session.runner(session.pair.target)
        held = min(session.prefix - method.observed(session.prefix), session.prefix - 1)
        geometry, device = runner.geometry, runner.device
        tokens = torch.arange(held, device=device).expand(geometry.layers, geometry.kv_heads, -1)
        for slot in session.slots:
            runner.cache.copy(slot, session.target.cache, slot, tokens)
        return runner

    def _evict(self, eviction: Eviction) -> None:
        """Read the rest of the prefix and drop what is not kept of it."""
        session = self.session
        for slot, name in zip(session.slots, session.names, strict=True):
            report = partial(session.progress, f"{name}: {eviction.method.name} prefill")
            report(eviction.target.cache.length(slot))
            eviction.prefill(slot, session.tokens[slot, : session.prefix].tolist(), progress=report)
        eviction.attend = EvictedMass(eviction.attend, session.target.cache, self.mass.add)

    def _decode(self, start: int, count: int) -> Tensor:
        """The sparse logits ``[batch, count, vocab]`` of one round."""
        session, speculator = self.session, self.speculator
        lengths = [start] * len(session.slots)
        export = self._draft_rows(start, count - 1)
        attend = speculator.sparse_attend(session.slots, lengths, count, export)
        step = session.step(speculator.target, start, count, attend, metered=True)
        return session.logits(speculator.target, step, start, count)

    def _draft_rows(self, start: int, steps: int) -> DraftAttention | None:
        """The draft's attention in ``steps`` steps from position ``start`` on, in one pass over the known tokens.

        One more if the method wants every row.
        """
        session, draft = self.session, self.speculator.draft
        export = self.speculator.export([start] * len(session.slots), steps)
        if export is None or draft is None:
            return None
        steps = export.rows
        attend = _StepwiseExport(export, 0, steps)
        step = session.step(draft, start - 1, steps + 1, attend, metered=True)
        draft.forward(step, session.tokens[:, start - 1 : start + steps], 1)
        return export

    def _compare(self, start: int, logits: Tensor) -> Tensor:
        """For each document the sums of :func:`row_sums` over the rows of a round."""
        session = self.session
        assert session.reference is not None, "the documents were read"
        first, count = start - session.prefix, logits.shape[1]
        reference = session.reference[: len(logits), first : first + count]
        following = session.tokens[:, start + 1 : start + count + 1]
        return torch.stack([row_sums(*rows) for rows in zip(reference, logits, following, strict=True)])

    def _result(self, slot: int, sums: Tensor) -> FidelityResult:
        """The result from the sums of each round, ``[rounds, figures]``."""
        session, method = self.session, self.method
        target, draft = self.speculator.target, self.speculator.draft
        kl, variation, agreement, nll, nll_dense = (sums.sum(0) / session.rows).tolist()
        kv_read, draft_read = read_fractions(target.meter, draft.meter if draft else None, slot)
        return FidelityResult(
            method=method.name,
            options=method.options(),
            document=session.names[slot],
            kl=kl,
            total_variation=variation,
            top1_agreement=agreement,
            perplexity=math.exp(nll),
            perplexity_dense=math.exp(nll_dense),
            attention_mass=self.mass.mean(slot),
            kv_read_fraction=kv_read,
            draft_read_fraction=draft_read,
            prefill=session.prefill.spec(),
            prefill_computed=session.target.prefill_meter.fraction(slot),
            detail=self._detail(sums, self.mass.breakdown(slot)),
        )

    def _detail(self, sums: Tensor, breakdown: Breakdown) -> Detail:
        rows, most = self.session.rows, self.session.gamma + 1
        counts = torch.full((len(sums),), most)
        counts[-1] = rows - (len(sums) - 1) * most
        means = sums / counts[:, None]
        kl, nll_change = means[:, 0].tolist(), (means[:, 3] - means[:, 4]).tolist()
        return Detail(tuple(kl), tuple(nll_change), breakdown)


def _both(mass: SelectionObserver, other: SelectionObserver | None) -> SelectionObserver:
    """``mass``, and another observer if there is one."""
    if other is None:
        return mass

    def both(step: Step, call: LayerCall, selection: Selection, output: Tensor) -> None:
        mass(step, call, selection, output)
        other(step, call, selection, output)

    return both


class _StepwiseExport(ExportAttend):
    """One pass over many rows that counts the bytes of decoding: two tokens in the first step, then one a step."""

    def count(self, step: Step, call: LayerCall, meter: ReadMeter) -> None:
        meter.add_dense(step.slots, step.positions[:, :2], call.window)
        for row in range(2, step.positions.shape[1]):
            meter.add_dense(step.slots, step.positions[:, row : row + 1], call.window)
