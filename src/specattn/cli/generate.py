"""``specattn generate``: continue a prompt, and say what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.errors import INTERRUPTED
from specattn.cli.models import Models, load_mapping
from specattn.cli.options import (
    SAMPLING,
    AuditRate,
    Debug,
    Device,
    Draft,
    Dtype,
    Fallback,
    Fast,
    Gamma,
    Json,
    MappingFile,
    MethodName,
    MethodOptions,
    PairName,
    Prefill,
    Target,
    parse_gamma,
)
from specattn.cli.output import console, print_json
from specattn.cli.progress import Bars
from specattn.cli.prompt import encode, read_prompt
from specattn.cli.stats import panel
from specattn.errors import SpecAttnError

if TYPE_CHECKING:
    from specattn.engine import Engine
    from specattn.request import GenerationResult, Request


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A document that comes before PROMPT; - reads standard input."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take the first N tokens of that document.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens to generate.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Divides the logits; 0 is greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Keep the likeliest tokens of this probability.", rich_help_panel=SAMPLING
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.", rich_help_panel=SAMPLING),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.", rich_help_panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="STR", help="Ends the text. Repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    method: MethodName = "specattn",
    options: MethodOptions = None,
    gamma: Gamma = "4",
    prefill: Prefill = "dense",
    fast: Fast = None,
    fallback: Fallback = None,
    audit: AuditRate = 0.0,
    mapping: MappingFile = None,
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt.

    The text goes to stdout as it comes, statistics to stderr. Ctrl-C keeps what there is.
    """
    asked = read_prompt(prompt, prompt_file)
    draft_tokens = parse_gamma(gamma)

    from specattn.audit import check_audit
    from specattn.engine import Engine
    from specattn.mapping.resolve import resolve_mapping
    from specattn.prefill.registry import parse_prefill
    from specattn.request import Request
    from specattn.sampling import SamplingParams
    from specattn.selection.registry import parse_method, parse_options

    sampling = SamplingParams(temperature, top_k, top_p, seed)
    selection = parse_method(method, **parse_options(options or []))
    reading = parse_prefill(prefill)
    check_audit(audit, selection)
    calibrated = load_mapping(mapping)
    models = Models(pair, target, draft, device, dtype)
    found = models.find()
    text = asked.cut(found.tokenizer, prompt_tokens).text
    request = Request(encode(found, text, chat=chat), max_new_tokens, sampling, tuple(stop or ()))
    request.check(found.context_limit)
    calibrated = resolve_mapping(found, selection, calibrated)
    reading.check(found.target.config)
    loaded, load_seconds = models.load(found)

    room = min(len(request.prompt) + max_new_tokens, loaded.context_limit)
    with (
        Bars(lambda role: len(request.prompt)) as bars,
        Engine(
            loaded,
            method=selection,
            mapping=calibrated,
            gamma=draft_tokens,
            prefill=reading,
            fast=fast,
            fallback=fallback,
            audit=audit,
            max_tokens=room,
            progress=lambda role, count: bars(f"{role} prefill", count),
        ) as engine,
    ):
        result = _decode(engine, request, _writer(json))
    report = _report(result, engine, load_seconds, draft_tokens)
    console().print(panel(report))
    if json:
        print_json(report)
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _decode(engine: Engine, request: Request, write: Callable[[str], None]) -> GenerationResult:
    """Run one request to its end, or to Ctrl-C; all of its text has then been written.

    Raises:
        SpecAttnError: if the engine gave the request up.
    """
    id = engine.submit(request)
    result, written = None, 0
    try:
        for update in engine.stream():
            write(update.text)
            written += len(update.text)
            result = update.result
    except KeyboardInterrupt:
        result = result or engine.cancel(id)
        if result is None:
            raise
    assert result is not None, "the stream ends with the request"
    if result.error is not None:
        raise SpecAttnError(result.error)
    write(result.text[written:] + "\n")
    return result


def _writer(json: bool) -> Callable[[str], None]:
    """Text goes to stdout, for a pipe; beside a JSON document, to a terminal that somebody watches."""
    stream = sys.stderr if json else sys.stdout
    if json and not stream.isatty():
        return lambda text: None

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _report(
    result: GenerationResult, engine: Engine, load_seconds: float, gamma: int | str
) -> dict[str, Any]:
    """The JSON document."""
    from specattn.environment import environment
    from specattn.memory import peak_bytes

    pair = engine.pair
    figures = asdict(result)
    del figures["error"]
    later = {name: figures.pop(name) for name in ("prefill", "prefill_computed", "prompt_tokens", "audit")}
    return {
        **figures,
        "seconds": {"load": load_seconds, "prefill": 0.0, **result.seconds},
        "environment": environment(pair.device, pair.dtype),
        "options": engine.method.options(),
        "gamma": gamma if pair.draft is not None else 0,
        **later,
        "pair": pair.name,
        "path": asdict(engine.path),
        "plans": engine.policy.report(),
        "memory": {"kv_cache_bytes": engine.nbytes, "peak_bytes": peak_bytes(pair.device)},
    }
