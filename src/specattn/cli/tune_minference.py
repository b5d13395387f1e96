"""``specattn tune minference``: choose a sparse pattern for each head on texts."""

from __future__ import annotations

from collections import Counter
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
    from specattn.prefill.head_patterns import HeadPatterns


def minference(
    text: Texts,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the patterns go.")] = Path(
        "minference.json"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each text to read: as many as will be served.")
    ] = 8192,
    budget: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the causal products that a head may compute.")
    ] = 0.3,
    pair: PairName = None,
    target: Target = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose the pattern of the minference prefill for each layer and head of the target.

    Use the result with --prefill minference:tuned=FILE.
    """
    from specattn.evaluation.documents import read_text
    from specattn.prefill.pattern_search import check_budget, choose_patterns

    texts = [read_text(path) for path in text]
    check_budget(budget, tokens)
    check_new(out, "--out", force=force)
    models = Models(pair, target, None, device, dtype).without_draft()
    loaded, load_seconds = models.load(models.find())
    layers = loaded.target.config.get_text_config().num_hidden_layers
    started = perf_counter()
    with Bars(lambda stage: layers * len(texts)) as bars:
        patterns = choose_patterns(loaded, texts, tokens=tokens, budget=budget, progress=bars)
    patterns.save(out)
    report = _report(loaded, patterns, out, {"load": load_seconds, "tune": perf_counter() - started})
    _print(report)
    if json:
        print_json(report)


def _report(loaded: Pair, patterns: HeadPatterns, out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The JSON document."""
    from specattn.environment import environment
    from specattn.prefill.shapes import KINDS

    counts = [Counter(head.kind for head in heads) for heads in patterns.layers]
    return {
        "target": loaded.name,
        "patterns": str(out),
        "tokens": patterns.tokens,
        "budget": patterns.budget,
        "error": patterns.error,
        "layers": [{kind: count[kind] for kind in KINDS} for count in counts],
        "seconds": seconds,
        "environment": environment(loaded.device, loaded.dtype),
    }


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    kinds = list(report["layers"][0])
    table = Table(title=f"{report['target']}: heads of each pattern", title_justify="left")
    for heading in ("layer", *kinds):
        table.add_column(heading, justify="right")
    for number, layer in enumerate(report["layers"]):
        table.add_row(str(number), *(str(layer[kind]) for kind in kinds))
    total = (str(sum(layer[kind] for layer in report["layers"])) for kind in kinds)
    table.add_row("all", *total, style="bold")
    screen = console()
    screen.print(table)
    screen.print(
        f"mean error of a head's output {report['error']:.1%} at {report['budget']:.0%} of the products; "
        f"{report['seconds']['tune']:.1f} s; wrote {report['patterns']}"
    )
