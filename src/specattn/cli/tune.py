"""``specattn tune``: search for a prefill method's thresholds on texts."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.models import Models
from specattn.cli.options import Debug, Device, Dtype, Json, PairName, Target, Texts
from specattn.cli.output import check_new, console, print_json
from specattn.cli.progress import Bars

if TYPE_CHECKING:
    from specattn.pairs import Pair
    from specattn.prefill.tuned import TunedThresholds


def sparge(
    text: Texts,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the thresholds go.")] = Path("sparge.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each text to read.")] = 8192,
    l1: Annotated[
        float, typer.Option("--l1", metavar="E", help="Relative L1 error that a head's output may have.")
    ] = 0.08,
    int8: Annotated[
        bool, typer.Option("--int8/--no-int8", help="Queries and keys as eight-bit integers.")
    ] = True,
    pair: PairName = None,
    target: Target = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search theta, tau and lam of the sparge prefill for each layer and head of the target.

    Use the result with --prefill sparge:tuned=FILE.
    """
    from specattn.evaluation.documents import read_text
    from specattn.prefill.tune import check_bound, tune_sparge

    texts = [read_text(path) for path in text]
    check_bound(l1)
    check_new(out, "--out", force=force)
    models = Models(pair, target, None, device, dtype).without_draft()
    loaded, load_seconds = models.load(models.find())
    started = perf_counter()
    with Bars(lambda stage: tokens * len(texts)) as bars:
        tuned = tune_sparge(loaded, texts, tokens=tokens, l1=l1, int8=int8, progress=bars)
    tuned.save(out)
    report = _report(loaded, tuned, out, {"load": load_seconds, "tune": perf_counter() - started})
    _print(report)
    if json:
        print_json(report)


def _report(loaded: Pair, tuned: TunedThresholds, out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The JSON document."""
    from specattn.environment import environment

    layers = [
        {
            "sparsity": sum(sparsity) / len(sparsity),
            "dense_heads": sum(value == 1 for value in tau),
            "worst_l1": max(l1),
        }
        for tau, l1, sparsity in zip(tuned.tau, tuned.l1, tuned.sparsity, strict=True)
    ]
    return {
        "target": loaded.name,
        "thresholds": str(out),
        "tokens": tuned.tokens,
        "l1": tuned.bound,
        "int8": tuned.int8,
        "sparsity": sum(layer["sparsity"] for layer in layers) / len(layers),
        "heads": sum(map(len, tuned.tau)),
        "dense_heads": sum(layer["dense_heads"] for layer in layers),
        "worst_l1": max(layer["worst_l1"] for layer in layers),
        "layers": layers,
        "seconds": seconds,
        "environment": environment(loaded.device, loaded.dtype),
    }


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{report['target']}: what its heads leave out", title_justify="left")
    for heading in ("layer", "sparsity", "dense heads", "worst L1"):
        table.add_column(heading, justify="right")
    rows = [*enumerate(report["layers"]), ("all", report)]
    for name, row in rows:
        figures = (f"{row['sparsity']:.1%}", str(row["dense_heads"]), f"{row['worst_l1']:.3f}")
        table.add_row(str(name), *figures, style="bold" if name == "all" else None)
    screen = console()
    screen.print(table)
    screen.print(
        f"{report['tokens']:,} tokens in {report['seconds']['tune']:.1f} s; wrote {report['thresholds']}"
    )
