"""What a round does: how many tokens the draft proposes, and whether the target reads all of its cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One way to run a round.

    Attributes:
        gamma: draft tokens; with 0 the draft does not run.
        sparse: whether the target reads what the method selects, or everything.
    """

    gamma: int
    sparse: bool

    def __str__(self) -> str:
        reading = "sparse" if self.sparse else "dense"
        return f"{reading}, gamma {self.gamma}" if self.gamma else f"{reading}, no draft"
