"""A pattern and its size for each head of a model, as a search found them: one JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specattn.errors import UsageError
from specattn.files import Format
from specattn.mapping.identity import config_hash, describe
from specattn.prefill.shapes import A_SHAPE, BLOCK_SPARSE, KINDS

VERSION = 1
"""The version of the file format."""

_FORMAT = Format("specattn-minference", VERSION, "patterns", "specattn tune minference")

_SIZES = ("vertical", "slash", "blocks")


@dataclass(frozen=True)
class HeadPattern:
    """What one head reads.

    Attributes:
        kind: one of :data:`~specattn.prefill.shapes.KINDS`.
        vertical: vertical lines; in an A-shape the first tokens.
        slash: slash lines; in an A-shape the window.
        blocks: key blocks of each query block, where the kind is block-sparse.
    """

    kind: str
    vertical: int = 0
    slash: int = 0
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"pattern {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if min(self.vertical, self.slash, self.blocks) < 0:
            raise UsageError(f"{self} has a negative size; the least is 0")

    def scaled(self, ratio: float) -> HeadPattern:
        """The same pattern ``ratio`` times as large."""
        return HeadPattern(self.kind, **{name: round(getattr(self, name) * ratio) for name in _SIZES})

    def covers(self, length: int, block: int) -> bool:
        """Whether it reads everything in a context of ``length`` tokens, so that nothing need be estimated."""
        if self.kind == BLOCK_SPARSE:
            return self.blocks * block >= length
        together = self.vertical + self.slash if self.kind == A_SHAPE else 0
        return max(self.vertical, self.slash, together) >= length


@dataclass(frozen=True)
class HeadPatterns:
    """What :func:`~specattn.prefill.pattern_search.choose_patterns` found.

    Attributes:
        layers: a pattern for each query head, for each layer; none in layers with a sliding window.
        target: the model's name, for messages.
        target_hash: its :func:`~specattn.mapping.identity.config_hash`.
        text_hash: SHA-256 of the texts' tokens.
        tokens: of each text.
        budget: share of the causal products that each head was allowed.
        error: mean relative error of the heads' outputs on the texts.
        specattn: the version of specattn that made it.
        version: of the file format.
    """

    layers: tuple[tuple[HeadPattern, ...], ...]
    target: str
    target_hash: str
    text_hash: str
    tokens: int
    budget: float
    error: float
    specattn: str
    version: int = VERSION

    def check(self, config: Any) -> None:
        """Make sure that the patterns were chosen for this model (a transformers configuration).

        Raises:
            UsageError: if they were chosen for another one.
        """
        if config_hash(config) != self.target_hash:
            raise UsageError(
                f"these patterns were chosen for {self.target}, not for {describe(config)}; choose them for this "
                "model with `specattn tune minference --text FILE --out minference.json`"
            )

    def save(self, path: str | Path) -> None:
        """Write the file, all of it or nothing.

        Raises:
            UsageError: if the file cannot be written.
        """
        content = asdict(self)
        content["layers"] = [[_without_zeros(asdict(head)) for head in heads] for heads in self.layers]
        _FORMAT.write(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> HeadPatterns:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if the file is missing or unreadable, holds no patterns, or ones of another version.
        """
        content = _FORMAT.read(Path(path))
        try:
            layers = tuple(tuple(HeadPattern(**head) for head in heads) for heads in content.pop("layers"))
            return cls(layers=layers, **content)
        except (KeyError, TypeError, UsageError):
            raise _FORMAT.damaged(Path(path)) from None


def _without_zeros(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sizes.items() if value}
