"""How many dense reads a token costs: lossless decoding beside dense speculation, and whether both say the same.

``python examples/lossless_reads.py --text book.txt --text code.py --out reads.json`` continues prompts of 2,048 to
16,384 tokens, greedily, by dense speculation and losslessly with each method. For every result one dense pass over the
prompt and the output tells, token by token, how far its logit is below the largest: 0 where a result is the dense
target's own choice. In a short dtype passes of different shapes round differently, and where two tokens are all but
equally likely that decides; in float32 (``--dtype float32``) this hardly happens.

On a GPU rounds and cycles take the fast path where the method has one; ``path`` says which they took, and if not that
one, why. ``tokens_per_second`` is of all prompts together, without reading them; what happens once, such as the capture
of graphs, is part of it (``specattn bench decode --lossless`` times cycles alone). The document is written anew after
each method; after the last it is ``complete``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from time import perf_counter
from typing import Any

import measuring
import torch
from measuring import load_pair, save
from torch import Tensor

import specattn
from specattn.attention import DenseAttend, attached
from specattn.environment import environment
from specattn.evaluation.documents import read_text
from specattn.generation import GenerationResult
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair
from specattn.path import choose_path
from specattn.runner import ModelRunner
from specattn.selection.registry import parse_method, split_methods

Prompts = Sequence[list[int]]


def cut_prompts(pair: Pair, texts: Sequence[str], count: int, least: int, most: int) -> list[list[int]]:
    """``count`` prompts, each longer than the last by the same factor, from places spread over the texts in turn."""
    tokens = [pair.tokenizer(text)["input_ids"] for text in texts]
    prompts = []
    for number in range(count):
        share = number / max(1, count - 1)
        length, text = round(least * (most / least) ** share), tokens[number % len(tokens)]
        if len(text) < length:
            raise SystemExit(f"a text has {len(text):,} tokens and {length:,} are needed; give a longer one")
        start = round((len(text) - length) * ((number * 0.618) % 1))
        prompts.append(text[start : start + length])
    return prompts


def gaps(pair: Pair, prompt: list[int], tokens: list[int]) -> list[float]:
    """How far the logit of each token is below the largest one, by one dense pass over all of them."""
    with attached(pair.target), torch.inference_mode():
        runner = ModelRunner(pair.target, tokens=len(prompt) + len(tokens), slots=1)
        slot = runner.cache.allocate(len(prompt) + len(tokens))
        if len(prompt) > 1:
            runner.prefill(slot, prompt[:-1])
        fed = [prompt[-1], *tokens[:-1]]
        step = runner.step([slot], [len(prompt) - 1], len(fed), DenseAttend(), metered=False)
        logits = runner.forward(step, torch.tensor([fed], device=runner.device), len(fed))[0].float()
    chosen = logits[:, : pair.vocab_size].gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    difference: Tensor = logits[:, : pair.vocab_size].amax(1, keepdim=True) - chosen
    return difference[:, 0].tolist()


def account(pair: Pair, prompt: list[int], result: GenerationResult, reference: list[int]) -> dict[str, Any]:
    """One prompt's figures; dense speculation has one dense read a round."""
    decoded, below = max(1, len(result.tokens) - 1), gaps(pair, prompt, result.tokens)
    pairs = enumerate(zip(result.tokens, reference, strict=False))
    different = next((place for place, (ours, theirs) in pairs if ours != theirs), None)
    lossless = asdict(result.lossless) if result.lossless else {}
    return {
        "prompt_tokens": len(prompt),
        "tokens": len(result.tokens),
        "equal": result.tokens == reference,
        "first_difference": different,
        "gap_there": None if different is None else below[different],
        "largest_gap": max(below),
        "tokens_below": sum(gap > 0 for gap in below),
        "dense_reads_per_token": result.rounds / decoded,
        "kv_reads_per_token": result.rounds * result.kv_read_fraction / decoded,
        "draft_acceptance_rate": result.acceptance_rate,
        **lossless,
    }


def run(
    pair: Pair, prompts: Prompts, options: dict[str, Any], reference: Sequence[list[int]] | None
) -> tuple[dict[str, Any], list[list[int]]]:
    """All prompts by one method: a row of the report, and the tokens."""
    lossless = bool(options.get("lossless"))
    path = choose_path(pair, parse_method(options["method"]), None, lossless=lossless)
    began = perf_counter()
    results: list[GenerationResult] = specattn.generate(pair, list(prompts), ignore_eos=True, **options)
    seconds = perf_counter() - began
    for result in results:
        if result.error is not None:
            raise SystemExit(f"{options['method']}: {result.error}")
    tokens = [result.tokens for result in results]
    per_prompt = [
        account(pair, prompt, result, expected)
        for prompt, result, expected in zip(prompts, results, reference or tokens, strict=True)
    ]
    names: tuple[str, ...] = ("equal", "dense_reads_per_token", "kv_reads_per_token", "draft_acceptance_rate")
    names += ("acceptance_rate",) if lossless else ()
    means = {name: mean(row[name] for row in per_prompt) for name in names}
    decoding = seconds - sum(result.seconds["prefill"] for result in results)
    row = {
        "method": options["method"],
        "draft": pair.draft is not None,
        "path": path.name if path.fast else f"{path.name}: {path.reason}",
        **means,
        "largest_gap": max(row["largest_gap"] for row in per_prompt),
        "tokens_per_second": sum(len(result.tokens) - 1 for result in results) / decoding,
    }
    print(json.dumps(row), flush=True)
    return {**row, "prompts": per_prompt}, tokens


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print a line a method, and write the report as it grows."""
    asked = parser().parse_args(arguments)
    pair = load_pair(asked)
    alone = Pair(pair.name, pair.target, None, pair.tokenizer)
    prompts = cut_prompts(
        pair, [read_text(path) for path in asked.text], asked.prompts, asked.least, asked.most
    )
    common = {
        "fallback": False,  # dense speculation is to speculate in every round
        "max_new_tokens": asked.max_new_tokens,
        "max_batch": asked.batch,
        "gamma": asked.gamma,
        "mapping": Mapping.load(asked.mapping) if asked.mapping else None,
    }
    lossless = {**common, "lossless": True, "lossless_every": asked.every}
    waiting = [
        (models, method)
        for models, methods in ((pair, asked.methods), (alone, asked.alone))
        for method in split_methods(methods)
    ]
    row, reference = run(pair, prompts, {**common, "method": "dense"}, None)
    report = {
        "command": "lossless_reads",
        "pair": pair.name,
        "gamma": asked.gamma,
        "every": asked.every,
        "max_new_tokens": asked.max_new_tokens,
        "results": [row],
        "complete": not waiting,
        "environment": environment(pair.device, pair.dtype),
    }
    save(report, asked.out)
    for number, (models, method) in enumerate(waiting, 1):
        report["results"].append(run(models, prompts, {**lossless, "method": method}, reference)[0])
        report["complete"] = number == len(waiting)
        save(report, asked.out)
    return report


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = measuring.parser(__doc__)
    result.add_argument("--prompts", type=int, default=20)
    result.add_argument("--least", type=int, default=2048, help="tokens of the shortest prompt")
    result.add_argument("--most", type=int, default=16384, help="tokens of the longest prompt")
    result.add_argument("--max-new-tokens", type=int, default=128)
    result.add_argument("--gamma", type=int, default=4)
    result.add_argument("--every", type=lambda text: int(text) if text.isdigit() else text, default="auto")
    result.add_argument("--methods", default="specattn:p=0.9", help="lossless, with the draft")
    result.add_argument("--alone", default="", help="lossless, without a draft: self:p=0.9,quest:budget=0.1")
    result.add_argument("--batch", type=int, default=4)
    return result


if __name__ == "__main__":
    main()
