"""Lm-evaluation-harness on this engine: ``lm_eval --model specattn --model_args pair=qwen2.5-coder,method=specattn``.

The harness finds the model through its entry point, or by importing this module. Tasks that generate text run with
any decode method; tasks that ask for log-likelihoods are refused. See ``docs/evaluation.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specattn.engine import Engine
from specattn.errors import SpecAttnError, UsageError
from specattn.gamma import check_gamma
from specattn.pairs import Pair, load_pair
from specattn.prefill.registry import parse_prefill
from specattn.request import GenerationResult, Request
from specattn.sampling import SamplingParams
from specattn.selection.registry import parse_method

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UsageError(
        f'lm-evaluation-harness cannot be imported ({error}): pip install "specattn[lm-eval]"'
    ) from error

BATCH = 8
"""Requests that are decoded at once where the harness leaves it open."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
"""Names under which tasks bound an answer; the first one that is there counts."""

NEUTRAL: Mapping[str, object] = {"num_beams": 1, "num_return_sequences": 1}
"""Options that tasks name although they change nothing with these values."""


@register_model("specattn")
class SpecAttnLM(LM):
    """A pair of models with a decode method, as the harness asks for it.

    Args:
        pair, target, draft, dtype, device: as for :func:`specattn.load_pair`; ``pair`` may be a loaded one.
        method, gamma, prefill: as for :func:`specattn.generate`.
        mapping: the calibrated map's file; the pair's own if ``None``.
        batch_size: requests that are decoded at once; 8 for ``auto``.
        max_batch_size: the most of them.
        max_length: tokens of prompt and answer; the models' context by default. A longer prompt loses its beginning,
            as with the harness's own models.
        max_gen_toks: tokens of an answer where a task does not say.
        seed: of tasks that sample; request i uses ``seed + i``.

    Attributes:
        results: what each request got and what it cost, in the order asked.

    Raises:
        UsageError: for models or options that cannot work.
    """

    def __init__(
        self,
        pair: Pair | str | None = None,
        target: str | None = None,
        draft: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        method: str = "specattn",
        gamma: int | str = 4,
        prefill: str = "dense",
        mapping: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_gamma(gamma)
        self.method, self.prefill, self.gamma = parse_method(method), parse_prefill(prefill), gamma
        self.batch = _batch(batch_size, max_batch_size)
        self.pair = (
            pair
            if isinstance(pair, Pair)
            else load_pair(pair, target=target, draft=draft, dtype=dtype, device=device)
        )
        self.mapping = _mapping(mapping)
        self.max_length = min(max_length or self.pair.context_limit, self.pair.context_limit)
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.results: list[GenerationResult] = []

    @property
    def tokenizer(self) -> Any:
        return self.pair.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """For the names of the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the harness's records; a name among several is not known here."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A prompt from messages.

        Raises:
            UsageError: if the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {self.pair.name} has no chat template; leave --apply_chat_template out"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to ``(context, options)``, in the order asked.

        Raises:
            UsageError: if a task asks for something that the engine cannot do, before any is answered.
            SpecAttnError: if a request failed.
        """
        if not requests:
            return []
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        texts: dict[int, str] = {}
        for number, result in self._run(asked, quiet=disable_tqdm):
            if result.error is not None:
                raise SpecAttnError(result.error)
            texts[number] = result.text
            self.cache_hook.add_partial("generate_until", requests[number].args, result.text)
        return [texts[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refused: the continuation would be part of the prompt, which no decode method reads.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "log-likelihoods are read off a prompt, before any token is decoded, so that every decode method would "
            "score alike; choose tasks with output_type generate_until, or measure `specattn eval fidelity`"
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refused, see :meth:`loglikelihood`.

        Raises:
            UsageError: always.
        """
        return self.loglikelihood(requests)

    def _request(self, number: int, context: str, options: Mapping[str, Any]) -> Request:
        asked = parse_options(options, self.max_gen_toks)
        room = self.max_length - asked.max_new_tokens
        if room < 1:
            raise UsageError(
                f"an answer of {asked.max_new_tokens:,} tokens leaves no room for a prompt in a context of "
                f"{self.max_length:,}; set max_gen_toks lower"
            )
        return Request(
            self._encode(context)[-room:],
            asked.max_new_tokens,
            SamplingParams(asked.temperature, asked.top_k, asked.top_p, self.seed + number),
            asked.stop,
        )

    def _encode(self, context: str) -> list[int]:
        """Token ids; a chat template may have written the first special token already."""
        first = self.tokenizer.bos_token
        special = not (first and context.startswith(first))
        tokens = list(self.tokenizer(context, add_special_tokens=special)["input_ids"])
        return tokens or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id]

    def _run(self, asked: Sequence[Request], *, quiet: bool) -> Iterator[tuple[int, GenerationResult]]:
        """Numbers and results, as they are done."""
        from tqdm import tqdm

        rooms = sorted((len(request.prompt) + request.max_new_tokens for request in asked), reverse=True)
        batch = min(self.batch, len(asked))
        results: dict[int, GenerationResult] = {}
        with (
            tqdm(total=len(asked), desc="specattn", disable=quiet or self.rank != 0) as bar,
            Engine(
                self.pair,
                method=self.method,
                mapping=self.mapping,
                gamma=self.gamma,
                prefill=self.prefill,
                max_batch=batch,
                max_tokens=sum(rooms[:batch]),
                max_length=rooms[0],
                fallback=False,  # a round that reads everything would say nothing of the method
            ) as engine,
        ):
            numbers = {engine.submit(request): number for number, request in enumerate(asked)}
            for update in engine.stream():
                if update.result is not None:
                    bar.update(1)
                    results[numbers[update.id]] = update.result
                    yield numbers[update.id], update.result
        self.results += [results[number] for number in sorted(results)]


@dataclass(frozen=True)
class Options:
    """How a task wants to be answered."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


def parse_options(options: Mapping[str, Any], max_new_tokens: int) -> Options:
    """A task's ``generation_kwargs``; without ``do_sample`` and a temperature answers are greedy.

    Raises:
        UsageError: for options that the engine does not have.
    """
    left = dict(options)
    until = left.pop("until", None) or ()
    lengths = [left.pop(name) for name in LENGTHS if name in left]
    sampled = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", None) or (1.0 if sampled else 0.0))
    parsed = Options(
        max_new_tokens=int(lengths[0]) if lengths else max_new_tokens,
        temperature=0.0 if sampled is False else temperature,
        top_k=int(left.pop("top_k", None) or 0),
        top_p=float(left.pop("top_p", None) or 1.0),
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
    )
    unknown = [name for name, value in left.items() if NEUTRAL.get(name) != value]
    if unknown:
        raise UsageError(
            f"the task asks for {unknown[0]}={left[unknown[0]]!r}, which the engine does not have; "
            "override it with --gen_kwargs or choose another task"
        )
    return parsed


def _batch(asked: int | str | None, most: int | None) -> int:
    """Requests at once.

    Raises:
        UsageError: if it is neither a positive number nor ``auto``.
    """
    text = str(asked or BATCH)
    if text.startswith("auto"):
        text = str(most or BATCH)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"batch_size={asked!r} must be a positive number or auto")
    return min(int(text), int(most)) if most else int(text)


def _mapping(path: str | None) -> Any:
    if path is None:
        return None
    from specattn.mapping.artifact import Mapping as LayerMapping

    return LayerMapping.load(Path(path))
