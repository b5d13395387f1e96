"""``specattn calibrate``: learn which draft attention predicts which target attention."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn.cli.models import Models
from specattn.cli.options import Debug, Device, Draft, Dtype, FixedGamma, Json, PairName, Target, Texts
from specattn.cli.output import check_new, check_plot, console, print_json
from specattn.cli.progress import Bars

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping
    from specattn.pairs import Pair


class Metric(StrEnum):
    """How alike two layers' attention is: the names of ``specattn.mapping.similarity.METRICS``."""

    KL = "kl"
    JS = "js"
    RECALL = "recall"


def calibrate(
    text: Texts,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the mapping goes.")] = Path(
        "mapping.safetensors"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the mapping if it exists.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the similarity of the layers, a heat map."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each text to read.")] = 4096,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds to sample in each text.")] = 128,
    gamma: FixedGamma = 4,
    metric: Annotated[Metric, typer.Option(help="Similarity that the layer map maximises.")] = Metric.KL,
    heads: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Draft heads of the global set (map=global), to the nearest whole group."
        ),
    ] = 84,
    seed: Annotated[int, typer.Option(help="Of the sampled rounds.")] = 0,
    pair: PairName = None,
    target: Target = None,
    draft: Draft = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Calibrate the mapping of a pair on texts like those that it will serve."""
    from specattn.evaluation.documents import read_text
    from specattn.mapping.calibrate import calibrate as run

    texts = [read_text(path) for path in text]
    check_new(out, "--out", force=force)
    check_plot(plot)
    models = Models(pair, target, draft, device, dtype)
    loaded, load_seconds = models.load(models.find())
    started = perf_counter()
    # How many passes the mixtures will need, nobody knows.
    with Bars(lambda stage: None if stage == "mixture" else tokens) as bars:
        mapping = run(
            loaded,
            texts,
            tokens=tokens,
            metric=metric.value,
            rounds=rounds,
            gamma=gamma,
            heads=heads,
            seed=seed,
            progress=bars,
        )
    mapping.save(out)
    if plot is not None:
        from specattn.mapping.plot import plot_mapping

        plot_mapping(mapping, plot)
    seconds = {"load": load_seconds, "calibrate": perf_counter() - started}
    report = _report(loaded, mapping, out, seconds)
    _print(report)
    if json:
        print_json(report)


def _report(pair: Pair, mapping: Mapping, out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The JSON document."""
    from specattn.environment import environment

    metadata = mapping.metadata
    return {
        "pair": pair.name,
        "mapping": str(out),
        "layer_map": mapping.layer_map.tolist(),
        "global_heads": mapping.global_heads.tolist(),
        "metric": metadata.metric,
        "tokens": metadata.tokens,
        "rounds": metadata.rounds,
        "kl_layer_map": metadata.kl_layer_map,
        "kl_global": metadata.kl_global,
        "kl_heads": metadata.kl_heads,
        "seconds": seconds,
        "environment": environment(pair.device, pair.dtype),
    }


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{report['pair']}: KL(target || mapped draft), nats", title_justify="left")
    table.add_column("map")
    table.add_column("KL", justify="right")
    table.add_row("layer: one draft layer for each target layer", f"{report['kl_layer_map']:.4f}")
    table.add_row(f"global: {len(report['global_heads'])} draft heads", f"{report['kl_global']:.4f}")
    table.add_row("heads: all draft heads", f"{report['kl_heads']:.4f}")
    screen = console()
    screen.print(table)
    screen.print("layer map:", " ".join(map(str, report["layer_map"])))
    screen.print(
        f"{report['rounds']:,} rounds in {report['seconds']['calibrate']:.1f} s; wrote {report['mapping']}"
    )
