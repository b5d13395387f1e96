"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specattn.errors import UsageError
from specattn.gamma import check_gamma

if TYPE_CHECKING:
    from specattn.selection.base import Method

MODELS, METHOD, SAMPLING, OUTPUT = "Models", "Method", "Sampling", "Output"
"""The panels of the help text."""


def parse_gamma(text: str) -> int | str:
    """A number of draft tokens, or ``auto``.

    Raises:
        UsageError: if it is neither.
    """
    try:
        gamma: int | str = int(text)
    except ValueError:
        gamma = text
    check_gamma(gamma)
    return gamma


def parse_methods(text: str) -> list[Method]:
    """Methods with their options, from text with commas between them.

    Raises:
        UsageError: if there are none, or one cannot be right.
    """
    from specattn.selection.registry import parse_method, split_methods

    methods = [parse_method(name) for name in split_methods(text)]
    if not methods:
        raise UsageError("--methods names no method; give at least one, such as specattn:p=0.9")
    return methods


PairName = Annotated[
    str | None,
    typer.Option(
        "--pair", metavar="NAME", help="A built-in pair; see `specattn info`.", rich_help_panel=MODELS
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The target: a hub id, a folder, a GGUF file or a built-in model.",
        rich_help_panel=MODELS,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The draft, a smaller model with the target's tokenizer.",
        rich_help_panel=MODELS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; by default CUDA if there is any.",
        rich_help_panel=MODELS,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="bfloat16 (the default), float16, float32, or auto: the checkpoint's own.",
        rich_help_panel=MODELS,
    ),
]
Yarn = Annotated[
    float | None,
    typer.Option(
        "--yarn",
        metavar="FACTOR",
        help="Stretch the context of both models by this factor with YaRN.",
        rich_help_panel=MODELS,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="How the target's tokens are selected; see `specattn info`.",
        rich_help_panel=METHOD,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--option",
        metavar="OPTION=VALUE",
        help="An option of the method, such as p=0.9. Repeatable.",
        rich_help_panel=METHOD,
    ),
]
MethodList = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="METHODS",
        help="Methods with their options: specattn:p=0.9:sink=8,streaming:budget=0.1",
        rich_help_panel=METHOD,
    ),
]
Prefill = Annotated[
    str,
    typer.Option(
        "--prefill",
        metavar="NAME[:OPTION=VALUE...]",
        help="How the target reads the prompt: dense, or a sparse method of `specattn info`; the draft reads densely.",
        rich_help_panel=METHOD,
    ),
]
AuditRate = Annotated[
    float,
    typer.Option(
        "--audit",
        metavar="RATE",
        help="Share of the rounds' layers and KV heads to compare with exact attention; 0 for none.",
        rich_help_panel=METHOD,
    ),
]
MappingFile = Annotated[
    Path | None,
    typer.Option(
        "--mapping",
        metavar="FILE",
        help="The calibrated mapping; by default the one that comes with the pair.",
        rich_help_panel=METHOD,
    ),
]
Gamma = Annotated[
    str,
    typer.Option(
        "--gamma",
        metavar="K|auto",
        help="Draft tokens a round, or auto: as many as pay.",
        rich_help_panel=METHOD,
    ),
]
Fast = Annotated[
    bool | None,
    typer.Option(
        "--fast/--no-fast",
        help="Whether rounds run on the device alone; by default on a GPU, where models and method allow it.",
        rich_help_panel=METHOD,
    ),
]
Fallback = Annotated[
    bool | None,
    typer.Option(
        "--fallback/--no-fallback",
        help="Whether rounds in which the method does not pay read everything, or do without the draft; by default "
        "where rounds run on a GPU alone.",
        rich_help_panel=METHOD,
    ),
]
FixedGamma = Annotated[
    int,
    typer.Option(
        "--gamma",
        metavar="K",
        min=1,
        help="Draft tokens a round; a round has K + 1 rows.",
        rich_help_panel=METHOD,
    ),
]
Texts = Annotated[
    list[Path],
    typer.Option("--text", metavar="FILE", help="A text file, UTF-8. Repeatable."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document as the last line of stdout.", rich_help_panel=OUTPUT
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=OUTPUT)
]
