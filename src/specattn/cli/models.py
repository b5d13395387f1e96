"""The models that a command was asked to use."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from specattn.cli.output import console

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping
    from specattn.pairs import Pair

DEFAULT_PAIR = "qwen2.5-coder"


@dataclass(frozen=True)
class Models:
    """The values of ``--pair``, ``--target``, ``--draft``, ``--device`` and ``--dtype``."""

    pair: str | None
    target: str | None
    draft: str | None
    device: str | None
    dtype: str | None

    @property
    def named(self) -> bool:
        """Whether any model was asked for by name."""
        return any((self.pair, self.target, self.draft))

    @property
    def name(self) -> str | None:
        """The built-in pair to use: the default one if no model was asked for."""
        return self.pair if self.named else DEFAULT_PAIR

    def load(self) -> tuple[Pair, float]:
        """The loaded pair and the seconds that it took.

        Raises:
            UsageError, SpecAttnError: as :func:`specattn.load_pair`.
        """
        from transformers.utils import logging

        from specattn.pairs import load_pair

        logging.set_verbosity_error()  # a prompt's length is our own check
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        console().print(
            f"loading {self.name or ' + '.join(filter(None, (self.target, self.draft)))} ...", style="dim"
        )
        started = perf_counter()
        pair = load_pair(
            self.name, target=self.target, draft=self.draft, device=self.device, dtype=self.dtype
        )
        return pair, perf_counter() - started


def load_mapping(path: Path | None) -> Mapping | None:
    """The mapping in a file, if one was given: read before any model, so that a bad one costs no time."""
    if path is None:
        return None
    from specattn.mapping.artifact import Mapping

    return Mapping.load(path)
