"""vLLM's plain decoding of a named shape with random weights, for ``specattn bench decode --vllm FILE``.

``vllm_decode.py --shape llama31 --context 32768 --batch 16 --out vllm.json``, where vLLM is installed and specattn can
be imported. What counts is the median time between two steps in which every request of the batch gets a token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from specattn.benchmarks.shapes import SHAPES, Shape

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PREFILL_STEP = 16384
"""Tokens of a step while prompts are read, half a million of them before the first step that counts. How many steps
that takes is how long the first request must last until the last has begun."""


def main() -> None:
    """Measure every batch and context, the smallest first, and write the rows."""
    arguments = _arguments()
    cells = [(batch, context) for batch in arguments.batch for context in arguments.context]
    longest = max(context + tokens_needed(batch, context, arguments.steps) for batch, context in cells)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows: list[dict[str, Any]] = []
    document = {"rows": rows, "environment": {"vllm": version("vllm"), "gpu": device}}
    with tempfile.TemporaryDirectory() as folder:
        write_config(SHAPES[arguments.shape].target, Path(folder), longest)
        llm = _engine(folder, longest, max(arguments.batch))
        for cell in sorted(cells, key=prod):
            rows.append(row(llm, arguments.shape, *cell, arguments.steps))
            # After each cell: the largest takes minutes to read, and what is done should not wait for it.
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    json.dump(document, sys.stdout)
    print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--context", type=int, action="append", required=True)
    parser.add_argument("--batch", type=int, action="append", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def tokens_needed(batch: int, context: int, steps: int) -> int:
    """Tokens that a request must get, so that ``steps`` are left when the last one has been read."""
    return steps + batch * context // PREFILL_STEP + batch + 8


def write_config(shape: Shape, folder: Path, length: int) -> None:
    """A model folder without weights."""
    config = shape.config()
    config.architectures = [ARCHITECTURES[shape.kind]]
    config.max_position_embeddings = length
    config.save_pretrained(folder)


def _engine(folder: str, length: int, batch: int) -> Any:
    from vllm import LLM

    return LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=batch,
        max_num_batched_tokens=PREFILL_STEP,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.92,
    )


def row(llm: Any, shape: str, batch: int, context: int, steps: int) -> dict[str, Any]:
    """A row in the form of ``specattn bench decode``."""
    found = {"shape": shape, "weights": "random", "batch": batch, "context": context, "mode": "plain"}
    times = step_times(llm.llm_engine, SHAPES[shape].target.vocab, batch, context, steps)
    if len(times) < steps:
        return found | {"mode": "skipped", "tokens_per_second": 0.0, "note": "never all at once: too large"}
    ms = 1e3 * median(times[-steps:])
    return found | {"tokens_a_round": 1.0, "ms": ms, "tokens_per_second": batch / ms * 1e3}


def step_times(engine: Any, vocab: int, batch: int, context: int, steps: int) -> list[float]:
    """Seconds between steps that gave every request a token, after others that did."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens_needed(batch, context, steps),
        ignore_eos=True,
        detokenize=False,
    )
    generator = torch.Generator().manual_seed(0)
    for request in range(batch):
        tokens = torch.randint(vocab, (context,), generator=generator).tolist()
        engine.add_request(f"{batch}-{context}-{request}", {"prompt_token_ids": tokens}, params)
    times, full_before, before = [], False, perf_counter()
    while engine.has_unfinished_requests():
        full = len(engine.step()) == batch
        now = perf_counter()
        if full and full_before:
            times.append(now - before)
        full_before, before = full, now
    return times


if __name__ == "__main__":
    main()
