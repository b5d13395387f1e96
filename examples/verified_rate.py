"""How often verified mode misses its tolerance on a pair's own attention, and what it reads for it.

``python examples/verified_rate.py --text book.txt --text code.txt --context 8192 --out rates.json`` decodes the last
rows of each text with ``specattn:eps=...``. Every output of every query head in every sparse layer is compared with
exact attention over the same keys and values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import specattn
from specattn.environment import environment
from specattn.evaluation.documents import Document, load_documents
from specattn.evaluation.fidelity import evaluate
from specattn.evaluation.output_error import LayerErrors, OutputErrors
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair
from specattn.selection.registry import get_method


def measure(
    pair: Pair,
    documents: list[Document],
    tolerances: list[float],
    options: dict[str, Any],
    *,
    context: int,
    rows: int,
    gamma: int,
    mapping: Mapping | None,
) -> Iterator[dict[str, Any]]:
    """One result for each tolerance and document."""
    for eps in tolerances:
        method = get_method("specattn", eps=eps, **options)
        for document in documents:
            errors = OutputErrors(eps)
            (fidelity,) = evaluate(
                pair,
                [document],
                [method],
                context=context,
                rows=rows,
                gamma=gamma,
                mapping=mapping,
                observer=errors,
            )
            yield {**asdict(fidelity), **rates(errors.layers()), "layers": list(map(asdict, errors.layers()))}


def rates(layers: list[LayerErrors]) -> dict[str, float]:
    """Of all layers together, and of the worst one."""
    return {
        "violation_rate": sum(each.violations for each in layers) / sum(each.outputs for each in layers),
        "worst_layer_rate": max(each.violations / each.outputs for each in layers),
        "joined_rate": sum(each.joined_violations for each in layers) / sum(each.joined for each in layers),
        "mean_error": sum(each.mean_error for each in layers) / len(layers),
        "capped_rate": sum(each.capped for each in layers) / len(layers),
    }


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="qwen2.5-coder", help="a built-in pair")
    parser.add_argument("--mapping", help="a mapping of the pair; by default its own")
    parser.add_argument("--text", action="append", required=True, help="a text file; may be repeated")
    parser.add_argument("--context", type=int, default=8192, help="tokens of each text")
    parser.add_argument("--rows", type=int, default=100, help="the last tokens, which are decoded")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--p", type=float, default=0.8)
    parser.add_argument("--a", type=float, default=0.2)
    parser.add_argument("--pilot", type=int, default=256)
    parser.add_argument("--tail", type=float, default=0, help="the most that may be sampled; 0 for no limit")
    parser.add_argument("--device")
    parser.add_argument("--out", help="a JSON file; by default standard output")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure, and write one JSON document."""
    args = arguments(given)
    options = {name: getattr(args, name) for name in ("delta", "p", "a", "pilot", "tail")}
    for eps in args.eps:
        get_method(
            "specattn", eps=eps, **options
        )  # refuses what is out of range before the models are loaded
    pair = specattn.load_pair(args.pair, device=args.device)
    mapping = Mapping.load(args.mapping) if args.mapping else None
    documents = load_documents(args.text, pair.tokenizer, args.context + 1)
    protocol = {"context": args.context, "rows": args.rows, "gamma": args.gamma}
    results = []
    for result in measure(pair, documents, args.eps, options, **protocol, mapping=mapping):
        results.append(result)
        print(
            f"{result['document']} eps={result['options']['eps']}: {result['violation_rate']:.4f} off by more, "
            f"worst layer {result['worst_layer_rate']:.4f}, read {result['kv_read_fraction']:.3f}, "
            f"KL {result['kl']:.4f}",
            file=sys.stderr,
        )
    report = {
        "pair": args.pair,
        **protocol,
        "delta": args.delta,
        "results": results,
        "environment": environment(pair.device),
    }
    text = json.dumps(report, indent=1)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
