"""``specattn eval passkey``."""

from __future__ import annotations

from typing import Annotated

import typer

from specattn.cli.tasks.execute import execute
from specattn.cli.tasks.options import Lengths, RunOptions, SamplesEach, Seed, given, with_run_options


@with_run_options
def passkey(
    *,
    length: Lengths = None,
    samples: SamplesEach = None,
    digits: Annotated[int, typer.Option(metavar="N", min=1, help="Digits of the pass key.")] = 5,
    seed: Seed = 0,
    options: RunOptions,
) -> None:
    """Digits hidden in filler at a random depth, to be said again at the end."""
    from specattn.evaluation.tasks.options import Integers
    from specattn.evaluation.tasks.passkey import Passkey

    asked = given(length=length and Integers(length), samples_each=samples)
    execute(Passkey(digits=digits, seed=seed, **asked), options)
