"""``specattn bench decode``: how fast rounds are, from the draft's first step to the accepted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.bench import publish, table
from specattn.cli.models import Models, load_mapping
from specattn.cli.options import (
    METHOD,
    MODELS,
    OUTPUT,
    Debug,
    Draft,
    Dtype,
    FixedGamma,
    Json,
    LosslessEvery,
    MappingFile,
    MethodName,
    MethodOptions,
    PairName,
    Target,
    parse_every,
)
from specattn.cli.output import check_output, check_plot, console
from specattn.errors import UsageError

if TYPE_CHECKING:
    from specattn.benchmarks.report import Report
    from specattn.benchmarks.rounds import Plan

SHOWN = (
    "context",
    "batch",
    "mode",
    "density",
    "tokens_a_round",
    "top1_agreement",
    "dense_reads_per_token",
    "ms",
    "draft_ms",
    "selection_ms",
    "verification_ms",
    "tokens_per_second",
    "copy_bandwidth_fraction",
    "note",
)
"""The figures that people see; the document has all."""


def decode(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A pair by its shapes, with random weights: llama2, llama31 (the default), qwen25, qwen3 or "
            "qwen-coder. Repeatable.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    dtype: Dtype = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What a pair with trained weights continues, UTF-8. Repeatable."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1, help="Tokens in the caches. Repeatable.", show_default="2048, 8192, 32768"
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Requests of a round. Repeatable.", show_default="1, 4, 16"),
    ] = None,
    resident: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With random weights: requests with pages of their own, which the others share in another "
            "order. For batches that do not fit into memory.",
            show_default="all",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds whose median counts.")] = 50,
    gamma: FixedGamma = 4,
    method: MethodName = "specattn:map=global",
    options: MethodOptions = None,
    density: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of the context, read by the sparse layers; imposed where weights are random.",
            rich_help_panel=METHOD,
        ),
    ] = 0.1,
    acceptance: Annotated[
        float,
        typer.Option(
            metavar="RATE",
            help="Of the draft's tokens; imposed where weights are random.",
            rich_help_panel=METHOD,
        ),
    ] = 0.7,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless",
            help="Time the lossless mode as well, with trained weights.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    lossless_every: LosslessEvery = None,
    lossless_method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What runs ahead in lossless cycles, with its options; one that needs no draft does without.",
            show_default="the method",
            rich_help_panel=METHOD,
        ),
    ] = None,
    mapping: MappingFile = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What benchmarks/vllm_decode.py measured on this device, to compare with."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the speed-up against the context.", rich_help_panel=OUTPUT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the JSON document here.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time whole rounds: plain decoding, dense speculation and sparse speculation, after checking what they compute.

    Needs a CUDA GPU. With random weights the acceptance rate and the density are imposed; a pair with trained weights
    continues texts, greedily.
    """
    from specattn.benchmarks.decode import check_vllm, compare_with_vllm, read_vllm, run_shapes
    from specattn.benchmarks.kernels import check_gpu
    from specattn.benchmarks.setting import check_cycles, check_fast
    from specattn.benchmarks.shapes import check_shapes
    from specattn.every import AUTO
    from specattn.lossless import check_lossless
    from specattn.selection.registry import parse_method, parse_options

    models = Models(pair, target, draft, None, dtype)
    _check_choice(models, shape, text, mapping, vllm, lossless=lossless)
    every = parse_every(lossless_every)
    names = shape or ["llama31"]
    check_shapes(names)
    selection = parse_method(method, **parse_options(options or []))
    ahead = selection if lossless_method is None else parse_method(lossless_method)
    check_lossless(ahead, lossless, every)
    if lossless_method is not None and not lossless:
        raise UsageError("--lossless-method has no effect without --lossless; add it, or leave this out")
    if lossless:
        check_cycles((), ahead)
    plan = _plan(
        contexts=sorted(set(context or [2048, 8192, 32768])),
        batches=sorted(set(batch or [1, 4, 16])),
        method=check_fast((), selection, imposed=not models.named),
        gamma=gamma,
        density=density,
        acceptance=acceptance,
        resident=resident,
        lossless=(AUTO if every is None else every) if lossless else None,
        lossless_method=ahead,
    )
    peers = read_vllm(vllm)
    check_vllm(peers, names, plan)
    check_plot(plot)
    if out is not None:
        check_output(out, "--out")
    check_gpu()
    if models.named:
        report = _run_pair(models, text or [], mapping, plan, repeats)
    else:
        import torch

        from specattn.benchmarks.timing import GraphTimer, copy_bandwidth

        report = run_shapes(names, plan, GraphTimer(repeats), copy_bandwidth(), torch.device("cuda"))
    compare_with_vllm(report, peers)
    chosen = [f"--shape {name}" for name in names] if not models.named else _named(models)
    _publish(report, plan, [*chosen, f"--repeats {repeats}"], plot, out, json=json)


def _check_choice(
    models: Models,
    shape: list[str] | None,
    text: list[Path] | None,
    mapping: Path | None,
    vllm: Path | None,
    *,
    lossless: bool,
) -> None:
    """Refuse options that say nothing of what is to be timed."""
    if models.named and shape:
        raise UsageError("--shape is for random weights; leave it out, or leave the pair out")
    if models.named and not text:
        raise UsageError("a pair with trained weights continues texts; give one with --text FILE")
    if models.named and vllm:
        raise UsageError("--vllm holds figures of shapes with random weights; leave the pair out")
    if not models.named and lossless:
        raise UsageError(
            "of random weights a dense pass verifies nothing that says how fast --lossless is; name a pair"
        )
    if not models.named and (text or mapping):
        raise UsageError("random weights continue no text and have a mapping of their own; name a pair")


def _plan(**options: Any) -> Plan:
    from specattn.benchmarks.rounds import Plan

    plan = Plan(**options)
    plan.check()
    return plan


def _run_pair(
    models: Models, texts: Sequence[Path], mapping: Path | None, plan: Plan, repeats: int
) -> Report:
    from specattn.benchmarks.decode import run_pair
    from specattn.benchmarks.timing import GraphTimer, copy_bandwidth
    from specattn.evaluation.documents import load_documents
    from specattn.mapping.resolve import resolve_mapping

    calibrated = load_mapping(mapping)
    found = models.find()
    longest = max(plan.contexts) + plan.room(repeats + 1)
    if longest > found.context_limit:
        raise UsageError(
            f"with what is decoded behind {max(plan.contexts):,} tokens texts come to {longest:,} and the models' "
            f"context ends at {found.context_limit:,}; lower --context, --repeats or --lossless-every"
        )
    calibrated = resolve_mapping(found, plan.method, calibrated)
    assert calibrated is not None
    documents = load_documents(texts, found.tokenizer, max(plan.contexts) + 1)
    loaded, _ = models.load(found)
    return run_pair(loaded, calibrated, documents, plan, GraphTimer(repeats), copy_bandwidth())


def _named(models: Models) -> list[str]:
    options = {"--pair": models.pair, "--target": models.target, "--draft": models.draft}
    return [f"{option} {name}" for option, name in options.items() if name]


def _publish(
    report: Report, plan: Plan, chosen: Sequence[str], plot: Path | None, out: Path | None, *, json: bool
) -> None:
    from specattn.benchmarks.crossover import crossovers, plot_speed_up

    figures = [f"--gamma {plan.gamma}", f"--density {plan.density:g}", f"--acceptance {plan.acceptance:g}"]
    document = report.document(" ".join(["specattn bench decode", *chosen, *figures]))
    document["crossover"] = crossovers(document["rows"])
    screen = console()
    for name in dict.fromkeys(row["shape"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["shape"] == name]
        columns = [column for column in SHOWN if any(column in row for row in rows)]
        screen.print(table(_title(name, rows), rows, columns))
    if document["crossover"]:
        screen.print(table("sparse as fast as dense speculation from", *_crossings(document["crossover"])))
        if plot is not None:
            plot_speed_up(document["rows"], plot)
    publish(report, document, out, json=json)


def _title(name: str, rows: Sequence[dict[str, Any]]) -> str:
    imposed = any(row.get("weights") == "random" for row in rows)
    return f"{name}: random weights, acceptance and density imposed" if imposed else name


def _crossings(found: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    rows = [
        {"shape": row["shape"], "batch": row["batch"], "context": row["bound"] or round(row["crossover"])}
        for row in found
    ]
    return rows, ["shape", "batch", "context"]
