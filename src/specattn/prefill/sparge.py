"""SpargeAttn as a prefill method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.prefill.base import PrefillCall, PrefillMethod, PrefillOutput
from specattn.prefill.thresholds import LAM, TAU, THETA, Thresholds, check_thresholds
from specattn.prefill.tuned import TunedThresholds
from specattn.prefill.two_stage import check_head_dim, two_stage_attention


@dataclass(frozen=True)
class Sparge(PrefillMethod):
    """Blocks that compressed queries and keys predict to matter (Zhang et al. 2025, arXiv 2502.18137).

    Attributes:
        theta: self-similarity above which a block of tokens is compressed to its mean.
        tau: share of the predicted attention that the kept key blocks hold.
        lam: nats below a row's largest logit so far at which a block's values are skipped; ``inf`` skips nothing.
        int8: multiply queries and smoothed keys as eight-bit integers.
        tuned: file of ``specattn tune sparge`` with thresholds for each layer and head; it takes the place of all
            the others.
    """

    name: ClassVar[str] = "sparge"

    theta: float = THETA
    tau: float = TAU
    lam: float = LAM
    int8: bool = True
    tuned: str = ""

    def __post_init__(self) -> None:
        check_thresholds(self.name, self.theta, self.tau, self.lam)
        own = {name: value for name, value in self.options().items() if name != "tuned"}
        if self.tuned and own != {"theta": THETA, "tau": TAU, "lam": LAM, "int8": True}:
            raise UsageError(
                f"sparge: tuned={self.tuned} brings its own theta, tau, lam and int8; leave either out"
            )

    def check(self, config: Any) -> None:
        check_head_dim(self.name, KVGeometry.from_config(config, torch.float32).head_dim)
        if self._tuned is not None:
            self._tuned.check(config)

    def attention(self, call: PrefillCall) -> PrefillOutput:
        tuned, heads, device = self._tuned, call.query.shape[1], call.query.device
        thresholds = (
            Thresholds.uniform(self.theta, self.tau, self.lam, heads, device)
            if tuned is None
            else tuned.of_layer(call.layer, device)
        )
        query, key, value = (tokens.transpose(0, 1)[None] for tokens in (call.query, call.key, call.value))
        result = two_stage_attention(
            query,
            key,
            value,
            thresholds,
            start=call.start,
            scaling=call.scaling,
            int8=self.int8 if tuned is None else tuned.int8,
        )
        return PrefillOutput(result.out[0].transpose(0, 1), result.computed.mean())

    @cached_property
    def _tuned(self) -> TunedThresholds | None:
        return TunedThresholds.load(self.tuned) if self.tuned else None
