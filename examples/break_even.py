"""Does the engine choose well? Tokens a second of fixed plans, and of an engine that may choose among them.

``python examples/break_even.py --text book.txt --context 2048 --context 8192 --batch 1 --batch 16 --out plans.json``
decodes the same prompts, greedily, plainly, with dense and with sparse speculation of each draft length, and then with
``gamma=auto`` and ``fallback``, which finds out while it goes what pays. Each engine serves the prompts twice, and
speed is that of the engine as a whole, host included, the second time: prompts have been read, graphs captured and
costs learnt by then. ``of_best`` is the chooser's speed over that of the fastest fixed plan.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import measuring
from measuring import load_pair, save

from specattn.engine import Engine
from specattn.environment import environment
from specattn.evaluation.documents import read_text
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair
from specattn.request import Request

STRIDE = 16
"""Tokens between the ends of two prompts of one text."""


def settings(method: str, gammas: Sequence[int]) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Names of the plans, whether they draft, and the engine's options; the one that chooses is the last."""
    yield "plain", False, {"method": "dense", "fallback": False}
    for gamma in gammas:
        yield f"dense, gamma {gamma}", True, {"method": "dense", "gamma": gamma, "fallback": False}
        yield f"sparse, gamma {gamma}", True, {"method": method, "gamma": gamma, "fallback": False}
    yield "chosen", True, {"method": method, "gamma": "auto", "fallback": True}


def cut_prompts(texts: Sequence[list[int]], context: int, batch: int) -> list[list[int]]:
    """``batch`` prompts of about ``context`` tokens, of the texts in turn, each from another place on."""
    prompts = []
    for number in range(batch):
        text, start = texts[number % len(texts)], number // len(texts) * STRIDE
        if len(text) < start + context:
            raise SystemExit(f"a text has {len(text):,} tokens and {start + context:,} are needed")
        prompts.append(text[start : start + context])
    return prompts


def speed(pair: Pair, prompts: Sequence[list[int]], tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of the second time, and what the engine has to say of its plans."""
    longest = max(map(len, prompts)) + tokens
    with Engine(
        pair, max_batch=len(prompts), max_tokens=longest * len(prompts), max_length=longest, **options
    ) as engine:
        engine.prepare([len(prompts)])
        serve(engine, prompts, tokens)
        learnt = Counter(engine.policy.chosen)
        rate = serve(engine, prompts, tokens)
        rounds = {str(plan): count for plan, count in (engine.policy.chosen - learnt).most_common()}
        return {"tokens_per_second": rate, "rounds": rounds, "policy": engine.policy.report()}


def serve(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Tokens a second from when all prompts have been read until the first answer is whole."""
    for prompt in prompts:
        engine.submit(Request(prompt, max_new_tokens=tokens, ignore_eos=True))
    began, new, whole = 0.0, 0, False
    while not engine.idle:
        updates = engine.advance()
        results = [update.result for update in updates if update.result]
        if any(result.error for result in results):
            raise SystemExit(str(results[0].error))
        if not began:
            began = perf_counter()
        elif not whole:  # from then on the batch is smaller
            new += sum(len(update.tokens) for update in updates)
            rate, whole = new / (perf_counter() - began), bool(results)
    return rate


def cell(
    pair: Pair, prompts: Sequence[list[int]], asked: argparse.Namespace, context: int
) -> Iterator[dict[str, Any]]:
    """A row for each plan."""
    alone, best = Pair(pair.name, pair.target, None, pair.tokenizer), 0.0
    mapping = Mapping.load(asked.mapping) if asked.mapping else None
    for name, drafts, options in settings(asked.method, asked.gamma):
        row: dict[str, Any] = {"context": context, "batch": len(prompts), "plan": name}
        row |= speed(pair if drafts else alone, prompts, asked.tokens, options | {"mapping": mapping})
        if name == "chosen":
            row["of_best"] = row["tokens_per_second"] / best
        best = max(best, row["tokens_per_second"])
        yield row


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every cell, print a line a plan, and write the report as it grows."""
    asked = parser().parse_args(arguments)
    pair = load_pair(asked)
    texts = [pair.tokenizer(read_text(path))["input_ids"] for path in asked.text]
    rows: list[dict[str, Any]] = []
    report = {
        "command": "break_even",
        "pair": pair.name,
        "method": asked.method,
        "tokens": asked.tokens,
        "rows": rows,
        "complete": False,
        "environment": environment(pair.device, pair.dtype),
    }
    cells = [(context, batch) for context in asked.context for batch in asked.batch]
    for number, (context, batch) in enumerate(cells, 1):
        for row in cell(pair, cut_prompts(texts, context, batch), asked, context):
            print(json.dumps({key: value for key, value in row.items() if key != "policy"}), flush=True)
            rows.append(row)
        report["complete"] = number == len(cells)
        save(report, asked.out)
    return report


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = measuring.parser(__doc__)
    result.add_argument("--context", action="append", type=int, required=True, help="repeatable")
    result.add_argument("--batch", action="append", type=int, required=True, help="repeatable")
    result.add_argument("--tokens", type=int, default=512, help="of an answer")
    result.add_argument(
        "--gamma", action="append", type=int, required=True, help="of the fixed plans; repeatable"
    )
    result.add_argument("--method", default="specattn:map=global:dense_layers=0:p=0.9:draft_p=0.9")
    return result


if __name__ == "__main__":
    main()
