"""Fidelity: how far sparse decoding strays from dense decoding, token by token, on real text.

The context but for its last rows is read densely; the rows are decoded with the method in rounds of gamma + 1, fed with
the text itself. The draft's attention comes from the same tokens, as in a round that is accepted whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from specattn.attention import SelectionObserver, attached
from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.decoding import Decoding
from specattn.evaluation.divergence import Detail, FidelityResult
from specattn.evaluation.documents import Document
from specattn.evaluation.session import Progress, Session
from specattn.mapping.artifact import Mapping
from specattn.mapping.resolve import resolve_mapping
from specattn.memory import shortage
from specattn.pairs import FoundPair, Pair
from specattn.prefill.base import PrefillMethod
from specattn.prefill.registry import resolve_prefill
from specattn.selection.base import Method
from specattn.selection.checks import check_at_least
from specattn.selection.eviction import check_prefill

__all__ = ["Detail", "FidelityResult", "Progress", "check_protocol", "evaluate"]


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
        session = Session(pair, context, rows, gamma, batch, prefill, methods, progress)
    for first in range(0, len(documents), batch):
        with fitting(), attached(*pair.models), torch.inference_mode():
            session.read(documents[first : first + batch])
        for method, found in zip(methods, mappings, strict=True):
            with fitting(), attached(*pair.models), torch.inference_mode():
                results = Decoding(session, method, found, observer).run()
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
