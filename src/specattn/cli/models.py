"""The models that a command was asked to use."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from specattn.cli.output import console

if TYPE_CHECKING:
    from specattn.mapping.artifact import Mapping
    from specattn.pairs import FoundPair, Pair

DEFAULT_PAIR = "qwen2.5-coder"


@dataclass(frozen=True)
class Models:
    """The values of ``--pair``, ``--target``, ``--draft``, ``--device``, ``--dtype`` and ``--yarn``."""

    pair: str | None
    target: str | None
    draft: str | None
    device: str | None
    dtype: str | None
    yarn: float | None = None

    @property
    def named(self) -> bool:
        """Whether any model was asked for by name."""
        return any((self.pair, self.target, self.draft))

    @property
    def name(self) -> str | None:
        """The built-in pair to use: the default one if no model was asked for."""
        return self.pair if self.named else DEFAULT_PAIR

    def without_draft(self) -> Models:
        """The target alone."""
        from specattn.pairs import BUILTIN

        if self.name in BUILTIN and not self.target:
            return replace(self, pair=None, target=BUILTIN[self.name].target, draft=None)
        return replace(self, draft=None)

    def find(self) -> FoundPair:
        """The pair without its weights: enough to refuse what cannot work.

        Raises:
            UsageError, SpecAttnError: as :func:`specattn.pairs.find_pair`.
        """
        from transformers.utils import logging

        from specattn.pairs import find_pair
        from specattn.pairs.load import resolve_device

        resolve_device(self.device)
        logging.set_verbosity_error()  # a prompt's length is our own check
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        return find_pair(self.name, target=self.target, draft=self.draft, dtype=self.dtype, yarn=self.yarn)

    def load(self, found: FoundPair) -> tuple[Pair, float]:
        """The loaded pair and the seconds that it took.

        Raises:
            UsageError, SpecAttnError: as :func:`specattn.load_pair`.
        """
        console().print(f"loading {found.name} ...", style="dim")
        started = perf_counter()
        return found.load(self.device), perf_counter() - started


def load_mapping(path: Path | None) -> Mapping | None:
    """The mapping in a file, if one was given: read before any model, so that a bad one costs no time."""
    if path is None:
        return None
    from specattn.mapping.artifact import Mapping

    return Mapping.load(path)
