"""Runs for the tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIGURES = {
    "total_variation": 0.05,
    "top1_agreement": 0.9,
    "perplexity": 11.0,
    "perplexity_dense": 10.0,
    "attention_mass": 0.8,
    "draft_read_fraction": 1.5,
}


def row(method: str, reads: float, kl: float, document: str = "book", **options: Any) -> dict[str, Any]:
    """A result of `eval fidelity`."""
    named = {"method": method, "options": options, "document": document}
    return {**named, "kl": kl, "kv_read_fraction": reads, **FIGURES}


def evaluation(results: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A document of `eval fidelity`."""
    return {
        "pair": "tiny",
        "context": 4096,
        "rows": 255,
        "gamma": 4,
        "documents": ["book"],
        "results": list(results),
        "complete": True,
        "environment": {"gpu": "a GPU", "dtype": "bfloat16"},
        **changes,
    }


def generation(accepted: Sequence[int]) -> dict[str, Any]:
    """A document of `generate --json`."""
    return {
        "method": "specattn",
        "tokens": [1] * (sum(accepted) + len(accepted)),
        "rounds": len(accepted),
        "accepted_per_round": list(accepted),
        "acceptance_rate": 0.5,
        "tokens_per_second": 12.25,
        "kv_read_fraction": 0.25,
        "draft_read_fraction": 1.5,
        "environment": {"cpu": "a CPU"},
    }


def benchmark(gate: str = "passed") -> dict[str, Any]:
    """A document of `bench`."""
    passed = gate == "passed"
    rows = [{"benchmark": "nucleus", "rows": 8, "us": 12.5}, {"benchmark": "verify", "us": 3.0}]
    return {
        "command": "specattn bench kernels",
        "gate": gate,
        "rows": rows if passed else [],
        "ratios": {"nucleus_vs_sort": 21.5} if passed else {},
        "environment": {"gpu": "a GPU"},
    }


def write(path: Path, document: Mapping[str, Any]) -> Path:
    """The document as a file."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
