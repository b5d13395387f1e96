"""Fidelity: how far sparse decoding strays from dense decoding, token by token, on real text.

The context but for its last rows is read densely; the rows are decoded with the method in rounds of gamma + 1, fed with
the text itself. The draft's attention comes from the same tokens, as in a round that is accepted whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from specattn.accounting import ReadMeter, read_fractions
from specattn.attention import DenseAttend, ExportAttend, LayerCall, Step, attached
from specattn.draft_attention import DraftAttention
from specattn.errors import UsageError
from specattn.evaluation.documents import Document
from specattn.kernels.dense_attention import attention_probabilities
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.pairs import FoundPair, Pair
from specattn.runner import ModelRunner
from specattn.selection.base import Method, Selection
from specattn.speculation import Speculator

Progress = Callable[[str, int], None]
"""Called with what is being done and how many tokens of it were just finished."""

REFERENCE_ROWS = 64
"""Rows of the dense reference that run at once."""


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


def evaluate(
    pair: Pair,
    documents: Sequence[Document],
    methods: Sequence[Method],
    *,
    context: int,
    rows: int,
    gamma: int = 4,
    mapping: Mapping | None = None,
    progress: Progress | None = None,
) -> Iterator[FidelityResult]:
    """Evaluate every method on every document; results come as they are ready.

    Args:
        documents: at least ``context + 1`` tokens each.
        context: tokens of text; the last ``rows`` of them are decoded with the method.
        gamma: rounds have ``gamma + 1`` rows.

    Raises:
        UsageError: if the figures do not fit each other or the models, before any work.
    """
    check_protocol(pair, context, rows, gamma)
    for document in documents:
        if len(document.tokens) <= context:
            raise UsageError(
                f"document {document.name!r} has {len(document.tokens):,} tokens and {context + 1:,} are needed; "
                "use a longer one or a shorter context"
            )
    mappings = [resolve_mapping(pair, method, mapping) for method in methods]
    session = _Session(pair, context, rows, gamma, progress)
    for document in documents:
        with attached(*pair.models), torch.inference_mode():
            session.read(document)
        for method, resolved in zip(methods, mappings, strict=True):
            with attached(*pair.models), torch.inference_mode():
                result = session.run(method, resolved)
            # Outside the block: the caller finds the models as they were.
            yield result


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
            f"context={context:,} is beyond the models' limit of {pair.context_limit:,}; use a shorter context"
        )


class _Session:
    """The models with one document at a time in their caches."""

    def __init__(self, pair: Pair, context: int, rows: int, gamma: int, progress: Progress | None) -> None:
        self.pair, self.context, self.rows, self.gamma = pair, context, rows, gamma
        self.prefix = context - rows
        self.progress = progress or (lambda what, count: None)
        size = {"tokens": context + gamma + 1, "slots": 1}
        self.target = ModelRunner(pair.target, **size)
        self.draft = ModelRunner(pair.draft, **size) if pair.draft is not None else None
        self.runners = [self.target] + ([self.draft] if self.draft is not None else [])
        for runner in self.runners:
            runner.cache.allocate(context + gamma + 1)

    def read(self, document: Document) -> None:
        """Fill the caches with the document's prefix and compute the dense reference."""
        self.document = document
        self._rewind(0)
        for role, runner in zip(("target", "draft"), self.runners, strict=False):
            report = partial(self.progress, f"{document.name}: {role} prefill")
            runner.prefill(0, document.tokens[: self.prefix], progress=report)
        parts = []
        for start in range(self.prefix, self.context, REFERENCE_ROWS):
            count = min(REFERENCE_ROWS, self.context - start)
            step = self.target.step([0], [start], count, DenseAttend(), metered=False)
            parts.append(self._logits(step, start, count))
            self.progress(f"{document.name}: dense reference", count)
        self.reference = torch.cat(parts)
        self._rewind(self.prefix)

    def run(self, method: Method, mapping: Mapping | None) -> FidelityResult:
        """Decode the rows with ``method`` and compare; the caches are left as they were."""
        mass = AttentionMass()
        speculator = Speculator(self.target, self.draft, method, mapping, self.pair.vocab_size, mass)
        for runner in self.runners:
            runner.meter.reset(0)
        sums = torch.zeros(5, dtype=torch.float64, device=self.target.device)
        for start in range(self.prefix, self.context, self.gamma + 1):
            count = min(self.gamma + 1, self.context - start)
            sums += self._compare(start, self._decode(speculator, start, count))
            self.progress(f"{self.document.name}: {method.name}", count)
        self._rewind(self.prefix)
        return self._result(method, (sums / self.rows).tolist(), mass)

    def _decode(self, speculator: Speculator, start: int, count: int) -> Tensor:
        """The sparse logits ``[count, vocab]`` of one round."""
        export = self._draft_rows(speculator, start, count - 1)
        attend = speculator.sparse_attend([start], count, export)
        return self._logits(self.target.step([0], [start], count, attend), start, count)

    def _draft_rows(self, speculator: Speculator, start: int, steps: int) -> DraftAttention | None:
        """The draft's attention in ``steps`` steps from position ``start`` on, in one pass over the known tokens."""
        export = speculator.export([start], steps)
        if export is None or self.draft is None:
            return None
        attend = _StepwiseExport(export, 0, steps)
        step = self.draft.step([0], [start - 1], steps + 1, attend)
        self.draft.forward(step, self._tokens(start - 1, steps + 1), 1)
        return export

    def _logits(self, step: Step, start: int, count: int) -> Tensor:
        logits = self.target.forward(step, self._tokens(start, count), count)
        return logits[0, :, : self.pair.vocab_size]

    def _compare(self, start: int, logits: Tensor) -> Tensor:
        """Sums over the rows of: KL, total variation, agreement, and both negative log likelihoods."""
        first = start - self.prefix
        dense = self.reference[first : first + len(logits)].float().log_softmax(-1)
        sparse = logits.float().log_softmax(-1)
        following = self._tokens(start + 1, len(logits))[0, :, None]
        return torch.stack(
            [
                (dense.exp() * (dense - sparse)).sum(),
                (dense.exp() - sparse.exp()).abs().sum() / 2,
                (dense.argmax(-1) == sparse.argmax(-1)).sum(),
                -sparse.gather(1, following).sum(),
                -dense.gather(1, following).sum(),
            ]
        ).double()

    def _result(self, method: Method, means: list[float], mass: AttentionMass) -> FidelityResult:
        fractions = read_fractions(self.target.meter, self.draft.meter if self.draft else None, 0)
        kl, variation, agreement, nll, nll_dense = means
        perplexity, perplexity_dense = torch.tensor([nll, nll_dense], dtype=torch.float64).exp().tolist()
        return FidelityResult(
            method=method.name,
            options=method.options(),
            document=self.document.name,
            kl=kl,
            total_variation=variation,
            top1_agreement=agreement,
            perplexity=perplexity,
            perplexity_dense=perplexity_dense,
            attention_mass=mass.mean(),
            kv_read_fraction=fractions[0],
            draft_read_fraction=fractions[1],
        )

    def _tokens(self, start: int, count: int) -> Tensor:
        return torch.tensor([self.document.tokens[start : start + count]], device=self.target.device)

    def _rewind(self, length: int) -> None:
        for runner in self.runners:
            runner.cache.set_length(0, length)


class _StepwiseExport(ExportAttend):
    """Many rows in one pass, but the bytes of a draft that reads two tokens in its first step and then one a step."""

    def count(self, step: Step, call: LayerCall, meter: ReadMeter) -> None:
        meter.add_dense(step.slots, step.positions[:, :2], call.window)
        for row in range(2, step.positions.shape[1]):
            meter.add_dense(step.slots, step.positions[:, row : row + 1], call.window)


class AttentionMass:
    """Observes sparse layers: the share of the exact attention mass that the selected tokens hold."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def __call__(self, step: Step, call: LayerCall, selection: Selection) -> None:
        for request, start in enumerate(step.starts):
            segments, first = step.segments(call.layer, request, None)
            exact = attention_probabilities(call.query[request], segments, start, first, call.scaling)
            mask = selection.to_mask(exact.shape[-1])[request]
            kept = exact.unflatten(0, (mask.shape[0], -1)) * mask[:, None, None]
            self._sum = self._sum + kept.sum(-1).mean().double()
            self._count += 1

    def mean(self) -> float:
        """The mean over layers, heads and rows; 1 where nothing was sparse."""
        return float(self._sum) / self._count if self._count else 1.0
