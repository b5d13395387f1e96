"""Options that published benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", help="The benchmark's files: a folder or a file.", show_default="the hub's"
    ),
]
Longest = Annotated[
    int,
    typer.Option(
        "--longest",
        metavar="N",
        min=0,
        help="Tokens of a prompt at most; a longer one loses its middle.",
        show_default="what the context has room for",
    ),
]
