"""The bytes that a round reads: what decoding is bound by, and the same on every device."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from specattn.geometry import KVGeometry
from specattn.pairs import Pair
from specattn.plan import Plan, draft_steps
from specattn.selection.base import Method
from specattn.selection.dense import Dense

FORGETTING = 0.05
"""Weight of the newest round in the density."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model.

    Attributes:
        weights: read in each pass.
        token: keys and values of one cached token.
    """

    weights: int
    token: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Footprint:
        """The footprint of a loaded model."""
        geometry = KVGeometry.from_config(model.config, model.dtype)
        return cls(sum(parameter.nbytes for parameter in model.parameters()), geometry.token_bytes)

    def read(self, tokens: float) -> float:
        """Bytes of a pass over requests that have ``tokens`` in the cache together."""
        return self.weights + tokens * self.token


@dataclass
class ByteModel:
    """What rounds of a pair read.

    Attributes:
        method: that of the sparse rounds.
        density: share of the cache that the target reads in them; a guess until :meth:`observe` knows.
    """

    target: Footprint
    draft: Footprint | None
    method: Method = field(default_factory=Dense)
    density: float = 0.2

    @classmethod
    def of(cls, pair: Pair, method: Method) -> ByteModel:
        """The model of a loaded pair."""
        draft = None if pair.draft is None else Footprint.of(pair.draft)
        return cls(Footprint.of(pair.target), draft, method)

    def nbytes(self, plan: Plan, tokens: int) -> float:
        """Bytes of a round of requests that have ``tokens`` in the cache together.

        The rows of a round share what the target reads; each step of the draft reads its own weights and cache.
        """
        target = self.target.read(tokens * (self.density if plan.sparse else 1.0))
        if self.draft is None or not plan.gamma:
            return target
        steps = draft_steps(self.method, plan.gamma) if plan.sparse else plan.gamma
        return target + steps * self.draft.read(tokens)

    def observe(self, share: float) -> None:
        """Learn from a sparse round that read this share of the target's cache."""
        self.density += FORGETTING * (share - self.density)
