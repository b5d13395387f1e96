"""Texts, evaluations of a tiny pair, and the figures that they should have."""

from __future__ import annotations

import pytest
import torch
from masked_model import round_spans
from tiny import tiny_mapping
from torch import Tensor

from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import FidelityResult, evaluate
from specattn.pairs import Pair
from specattn.selection.registry import parse_method

CONTEXT, ROWS, GAMMA = 120, 43, 4
PREFIX = CONTEXT - ROWS
SPANS = round_spans(PREFIX, CONTEXT, GAMMA)


def document(name: str = "book", seed: int = 4, length: int = CONTEXT + 1) -> Document:
    tokens = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))
    return Document(name, tokens.tolist())


def run(pair: Pair, methods: list[str], documents: list[Document] | None = None, **options):
    options = {"context": CONTEXT, "rows": ROWS, "gamma": GAMMA, **options}
    if pair.draft is not None:
        options.setdefault("mapping", tiny_mapping(pair))
    return list(evaluate(pair, documents or [document()], [parse_method(m) for m in methods], **options))


def figures(dense: Tensor, sparse: Tensor, tokens: list[int]) -> dict[str, float]:
    """The figures of the evaluated rows from logits ``[context, vocab]``, in float64, row by row."""
    sums = dict.fromkeys(("kl", "total_variation", "top1_agreement", "nll", "nll_dense"), 0.0)
    for row in range(PREFIX, CONTEXT):
        p, q = dense[row].double().softmax(0), sparse[row].double().softmax(0)
        sums["kl"] += float((p * (p / q).log()).sum())
        sums["total_variation"] += float((p - q).abs().sum()) / 2
        sums["top1_agreement"] += float(p.argmax() == q.argmax())
        sums["nll"] -= float(q[tokens[row + 1]].log())
        sums["nll_dense"] -= float(p[tokens[row + 1]].log())
    means = {name: total / ROWS for name, total in sums.items()}
    perplexities = {
        name.replace("nll", "perplexity"): float(torch.tensor(means.pop(name)).exp())
        for name in ("nll", "nll_dense")
    }
    return means | perplexities


def assert_figures(result: FidelityResult, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=2e-3, abs=1e-6), name


def assert_dense(result: FidelityResult) -> None:
    assert abs(result.kl) < 1e-9
    assert result.total_variation < 1e-5
    assert result.top1_agreement == 1
    assert result.attention_mass == pytest.approx(1, abs=1e-6)
    assert result.kv_read_fraction == 1
    assert result.perplexity == pytest.approx(result.perplexity_dense, rel=1e-5)
