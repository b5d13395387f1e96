"""Thresholds that a search found for each layer and head of a model: one JSON file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specattn.errors import UsageError
from specattn.files import Format
from specattn.mapping.identity import config_hash, describe
from specattn.prefill.thresholds import OFF, Thresholds, check_thresholds

VERSION = 1
"""The version of the file format."""

_FORMAT = Format("specattn-sparge", VERSION, "thresholds", "specattn tune sparge")

Table = list[list[float]]
"""A number for each layer and query head."""


@dataclass(frozen=True)
class TunedThresholds:
    """What :func:`specattn.tune_sparge` found.

    Attributes:
        theta, tau, lam: thresholds; a head with ``tau`` 1 and an infinite ``lam`` is dense.
        l1: relative L1 error of each head's output on the text, 0 in layers with a sliding window.
        sparsity: share of both matrix products that each head left out there.
        target: the model's name, for messages.
        target_hash: its :func:`~specattn.mapping.identity.config_hash`.
        text_hash: SHA-256 of the text's tokens.
        tokens: tokens of all texts together.
        bound: the relative L1 error that was allowed.
        int8: whether queries and keys were multiplied as integers.
        specattn: the version of specattn that made it.
        version: of the file format.
    """

    theta: Table
    tau: Table
    lam: Table
    l1: Table
    sparsity: Table
    target: str
    target_hash: str
    text_hash: str
    tokens: int
    bound: float
    int8: bool
    specattn: str
    version: int = VERSION

    def of_layer(self, layer: int, device: torch.device) -> Thresholds:
        """The thresholds of one layer's heads."""
        theta, tau, lam = (
            torch.tensor(table[layer], device=device) for table in (self.theta, self.tau, self.lam)
        )
        return Thresholds(theta, tau, lam)

    def check(self, config: Any) -> None:
        """Make sure that the thresholds were searched for this model (a transformers configuration).

        Raises:
            UsageError: if they were searched for another one.
        """
        if config_hash(config) != self.target_hash:
            raise UsageError(
                f"these thresholds were tuned for {self.target}, not for {describe(config)}; tune them for this "
                "model with `specattn tune sparge --text FILE --out sparge.json`"
            )

    def save(self, path: str | Path) -> None:
        """Write the file, all of it or nothing.

        Raises:
            UsageError: if the file cannot be written.
        """
        content = asdict(self)
        content["lam"] = [[None if value == OFF else value for value in row] for row in self.lam]
        _FORMAT.write(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> TunedThresholds:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if the file is missing or unreadable, holds no thresholds, or ones of another version.
        """
        content = _FORMAT.read(Path(path))
        try:
            content["lam"] = [[OFF if value is None else value for value in row] for row in content["lam"]]
            tuned = cls(**content)
            tuned._check_tables()
        except (KeyError, TypeError, ValueError):
            raise _FORMAT.damaged(Path(path)) from None
        return tuned

    def _check_tables(self) -> None:
        """Every table has a number in range for each layer and head."""
        shapes = {
            tuple(len(row) for row in table)
            for table in (self.theta, self.tau, self.lam, self.l1, self.sparsity)
        }
        if len(shapes) != 1:
            raise ValueError("tables of different shapes")
        for rows in zip(self.theta, self.tau, self.lam, strict=True):
            for theta, tau, lam in zip(*rows, strict=True):
                check_thresholds("tuned", theta, tau, lam)
        if not all(
            math.isfinite(value) for table in (self.l1, self.sparsity) for row in table for value in row
        ):
            raise ValueError("figures that are no numbers")
