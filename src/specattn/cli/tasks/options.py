"""The options that the commands of all tasks share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from specattn.cli.models import Models
from specattn.cli.options import (
    Debug,
    Device,
    Draft,
    Dtype,
    Gamma,
    Json,
    MappingFile,
    MethodList,
    PairName,
    Prefill,
    Target,
    Yarn,
)

RUN = "Run"
"""The panel of what concerns the run as a whole."""

Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", metavar="N", min=1, help="Tokens of prompt and answer. Repeatable."),
]
SamplesEach = Annotated[
    int | None, typer.Option("--samples", metavar="N", min=1, help="Samples of each kind and length.")
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE|ID",
        help="The published data, JSON lines; or its hub id, where `datasets` is installed.",
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Tokens of an answer at most.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]


@dataclass(frozen=True)
class RunOptions:
    """How a task is run: methods, models, and the folder of the run."""

    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="The run's folder; a run that is there goes on.",
            show_default="runs/TASK-DIGEST, of what is asked",
            rich_help_panel=RUN,
        ),
    ] = None
    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            metavar="N",
            min=1,
            help="Samples that are decoded at once; less needs less memory.",
            rich_help_panel=RUN,
        ),
    ] = 8
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Ask the first N samples of each group only.",
            rich_help_panel=RUN,
        ),
    ] = None
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put prompts into the tokenizer's chat template.", rich_help_panel=RUN),
    ] = False
    methods: MethodList = "specattn"
    gamma: Gamma = "4"
    prefill: Prefill = "dense"
    mapping: MappingFile = None
    pair: PairName = None
    target: Target = None
    draft: Draft = None
    device: Device = None
    dtype: Dtype = None
    yarn: Yarn = None
    json: Json = False
    debug: Debug = False

    @property
    def models(self) -> Models:
        """The models that were asked for."""
        return Models(self.pair, self.target, self.draft, self.device, self.dtype, self.yarn)


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with the fields of :class:`RunOptions` as further parameters in the place of ``options``."""
    shared = [field.name for field in dataclasses.fields(RunOptions)]

    def called(**values: Any) -> None:
        options = RunOptions(**{name: values.pop(name) for name in shared})
        command(options=options, **values)

    parameters = [p for p in _parameters(command) if p.name != "options"] + _parameters(RunOptions)
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    return called


def _parameters(callable: Callable[..., Any]) -> list[inspect.Parameter]:
    """Keyword parameters with their types, not the text of them."""
    hints = get_type_hints(callable, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(callable).parameters.items()
    ]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; a task has its own defaults for the others."""
    return {name: value for name, value in options.items() if value is not None and value != []}
