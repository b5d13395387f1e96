"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import specattn
from specattn.cli.bench import kernels
from specattn.cli.bench_decode import decode
from specattn.cli.calibrate import calibrate
from specattn.cli.errors import Command
from specattn.cli.evaluate import fidelity, perplexity
from specattn.cli.generate import generate
from specattn.cli.info import info
from specattn.cli.report import report
from specattn.cli.tasks.gsm8k import gsm8k
from specattn.cli.tasks.humaneval import humaneval
from specattn.cli.tasks.infinitebench import infinitebench
from specattn.cli.tasks.longbench import longbench, longbench2
from specattn.cli.tasks.needle import needle
from specattn.cli.tasks.passkey import passkey
from specattn.cli.tasks.ruler import ruler
from specattn.cli.tasks.specbench import specbench
from specattn.cli.tune import sparge
from specattn.cli.tune_minference import minference

SETTINGS = {"help_option_names": ["-h", "--help"]}

# Completion asks which shell is running; tracebacks are our own business (errors.py).
app = typer.Typer(
    context_settings=SETTINGS, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)
evaluation = typer.Typer(context_settings=SETTINGS, no_args_is_help=True)
tuning = typer.Typer(context_settings=SETTINGS, no_args_is_help=True)
bench = typer.Typer(context_settings=SETTINGS, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specattn {specattn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-context decoding in which the draft model tells the target which KV-cache tokens to read."""


@evaluation.callback()
def _evaluation() -> None:
    """Measure what a method costs in quality, against the same model reading everything."""


@tuning.callback()
def _tuning() -> None:
    """Search a prefill method's thresholds for a model, on texts like those that it will read."""


@bench.callback()
def _bench() -> None:
    """Measure how fast it is, beside its peers and after checking the results."""


app.command(cls=Command)(generate)
app.command(cls=Command)(calibrate)
app.add_typer(evaluation, name="eval")
evaluation.command(cls=Command)(fidelity)
evaluation.command(cls=Command)(perplexity)
for task in (passkey, needle, ruler, humaneval, gsm8k, longbench, longbench2, infinitebench, specbench):
    evaluation.command(cls=Command)(task)
app.add_typer(tuning, name="tune")
tuning.command(cls=Command)(sparge)
tuning.command(cls=Command)(minference)
app.add_typer(bench, name="bench")
bench.command(cls=Command)(kernels)
bench.command(cls=Command)(decode)
app.command(cls=Command)(report)
app.command(cls=Command)(info)
