"""Which path an engine's rounds take: the fast one, or PyTorch's, and why."""

from __future__ import annotations

from dataclasses import dataclass

from specattn.errors import UsageError
from specattn.fast.speculator import unsupported
from specattn.pairs import Pair
from specattn.selection.base import Method


@dataclass(frozen=True)
class Path:
    """A path and the reason for it.

    Attributes:
        name: ``fast`` or ``torch``.
        reason: why it is not the fast one, if it is not.
    """

    name: str
    reason: str | None = None

    @property
    def fast(self) -> bool:
        """Whether whole rounds run on the device."""
        return self.name == "fast"


def choose_path(
    pair: Pair, method: Method, fast: bool | None, *, lossless: bool = False, audited: bool = False
) -> Path:
    """The path of a pair and a method.

    Args:
        fast: whether to take the fast path; ``None`` takes it where there are kernels for it, on a GPU.
        lossless: whether dense passes verify the rounds.
        audited: whether attention is to be looked at on the side, which a captured round has no place for.

    Raises:
        UsageError: if it was asked for and cannot be taken.
    """
    if fast is False:
        return Path("torch", "it was asked for")
    reason = unsupported(method, pair.models, lossless=lossless)
    if audited:
        reason = "audits run on the PyTorch path"
    if fast and reason is not None:
        raise UsageError(
            f"the fast path cannot be taken: {reason}. Leave the choice to the engine, or turn it off."
        )
    if reason is None and fast is None and pair.device.type != "cuda":
        reason = f"the kernels of the fast path need a GPU, and the models are on {pair.device}"
    return Path("fast") if reason is None else Path("torch", reason)
