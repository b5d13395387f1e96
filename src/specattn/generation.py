"""Generate from prompts with a pair of models: the one-call interface over the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from specattn.admission import Progress
from specattn.engine import Engine
from specattn.errors import SpecAttnError, UsageError
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair
from specattn.prefill.base import PrefillMethod
from specattn.request import GenerationResult, Request
from specattn.sampling import SamplingParams
from specattn.selection.base import Method

Prompt = str | Sequence[int]

__all__ = ["GenerationResult", "generate", "tokenize"]


@overload
def generate(pair: Pair, prompts: str, **options: Any) -> GenerationResult: ...
@overload
def generate(
    pair: Pair, prompts: list[Prompt] | tuple[Prompt, ...], **options: Any
) -> list[GenerationResult]: ...
def generate(  # type: ignore[misc]  # the overloads pass the options on unnamed
    pair: Pair,
    prompts: str | list[Prompt] | tuple[Prompt, ...],
    *,
    method: Method | str = "specattn",
    mapping: Mapping | None = None,
    max_new_tokens: int = 128,
    gamma: int | str = 4,
    prefill: PrefillMethod | str = "dense",
    lossless: bool = False,
    lossless_every: int | str | None = None,
    fast: bool | None = None,
    fallback: bool | None = None,
    audit: float = 0.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    max_batch: int = 8,
    on_text: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
) -> GenerationResult | list[GenerationResult]:
    """Continue one prompt, or several in a batch.

    Args:
        pair: what :func:`specattn.load_pair` returned.
        prompts: a text, or a list whose items are texts or lists of token ids.
        method: a selection method or its name with options, ``specattn:p=0.9``.
        mapping: the calibrated map; the pair's own if ``None``.
        max_new_tokens: tokens to generate for each prompt at most.
        gamma: draft tokens a round, or ``auto``.
        prefill: how the target reads the prompts, a prefill method or its name with options, ``sparge:tau=0.95``.
        lossless: deliver what the dense target would choose: dense passes verify what sparse rounds accepted.
        lossless_every: after how many tokens they do, or ``auto`` (the default): as many as pay.
        fast: whether rounds run on the device alone; ``None``: on a GPU, where they can.
        fallback: whether rounds in which the method does not pay read everything, see :class:`specattn.Engine`.
        audit: share of the rounds' layers and KV heads that are compared with exact attention.
        temperature, top_k, top_p, seed: how tokens are drawn; temperature 0 is greedy. Prompt i uses ``seed + i``.
        stop: strings at which generation ends.
        ignore_eos: go on after an end-of-sequence token.
        max_batch: prompts that are decoded at once.
        on_text: called with a prompt's number and its new text after each round.
        progress: called with ``target`` or ``draft`` and the prompt tokens just read.

    Returns:
        A result for each prompt, in their order; a single one for a single text. Of several prompts one that fails
        leaves the others running: its result says why in ``error``.

    Raises:
        SpecAttnError: if the single prompt failed.
        UsageError: for input that cannot be served, before any work.
        CacheFullError: if the KV caches do not fit in memory.
    """
    single = isinstance(prompts, str)
    items: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    if not items:
        raise UsageError("no prompt was given")
    requests = [
        Request(
            prompt=tokenize(pair, item),
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature, top_k, top_p, seed + number),
            stop=tuple(stop),
            ignore_eos=ignore_eos,
        )
        for number, item in enumerate(items)
    ]
    for request in requests:
        request.check(pair.context_limit, pair.vocab_size)
    batch = min(max_batch, len(requests))
    room = sorted((len(request.prompt) + max_new_tokens for request in requests), reverse=True)
    results: dict[int, GenerationResult] = {}
    with Engine(
        pair,
        method=method,
        mapping=mapping,
        gamma=gamma,
        prefill=prefill,
        lossless=lossless,
        lossless_every=lossless_every,
        fast=fast,
        fallback=fallback,
        audit=audit,
        max_batch=batch,
        max_tokens=sum(room[:batch]),
        max_length=room[0],
        progress=progress,
    ) as engine:
        numbers = {engine.submit(request): number for number, request in enumerate(requests)}
        for update in engine.stream():
            if on_text and update.text:
                on_text(numbers[update.id], update.text)
            if update.result is not None:
                results[numbers[update.id]] = update.result
    ordered = [results[number] for number in range(len(requests))]
    if single and ordered[0].error is not None:
        raise SpecAttnError(ordered[0].error)
    return ordered[0] if single else ordered


def tokenize(pair: Pair, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids pass through."""
    if isinstance(prompt, str):
        return list(pair.tokenizer(prompt)["input_ids"])
    return [int(token) for token in prompt]
