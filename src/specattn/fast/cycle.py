"""The two parts of a cycle of the lossless mode, without the host: rounds that run ahead, and the dense pass.

Requests of a batch run ahead by different numbers of tokens. One that has enough is padding in the rounds that the
others still need; in the dense pass all have as many rows, and those that one lacks repeat its last at its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specattn.acceptance import Verdict, verify_greedy
from specattn.fast.ahead import RunAhead
from specattn.fast.model import FastModel
from specattn.fast.pass_scores import PassScores
from specattn.fast.requests import Requests, RoundInputs
from specattn.fast.round import FastRound
from specattn.fast.self_lists import SelfLists
from specattn.sampling import SamplingState, Stream, race, warp
from specattn.selection.base import Selection
from specattn.speculation import Outcome, Proposal


class AheadRound(FastRound):
    """A sparse round of those requests that are to run on ahead, whose tokens are chosen by races.

    Args:
        ahead: where its tokens go.
        parts, shape: see :class:`specattn.fast.round.FastRound`.
    """

    def __init__(self, ahead: RunAhead, *parts: Any, **shape: Any) -> None:
        super().__init__(*parts, **shape)
        self.ahead = ahead

    def run(self) -> Tensor:
        """The round, and a report of all rounds of the cycle so far: how many tokens each had, and the account."""
        asked = self.requests.inputs(self.slots, self.sampling)
        inputs = self.requests.inputs(self.ahead.going_on(self.slots), self.sampling)
        outcome = self.outcome(inputs)
        self.ahead.append(inputs, outcome)
        self.requests.advance(inputs, outcome)
        rounds = Outcome(self.ahead.rounds[self.slots], self.ahead.counts[self.slots])
        return self.requests.report(asked, rounds)

    def _choose(
        self, inputs: RoundInputs, logits: Tensor, stream: Stream, draw: int
    ) -> tuple[Tensor, Tensor]:
        return winners(logits, inputs.sampling, inputs.lengths + draw), logits[..., :0]

    def _judge(self, inputs: RoundInputs, proposal: Proposal, logits: Tensor) -> Verdict:
        return verify_greedy(proposal.tokens, winners(logits, inputs.sampling, inputs.lengths))


class SelfRound(AheadRound):
    """The same for self-speculation.

    Args:
        lists: what the target reads.
    """

    def __init__(self, lists: SelfLists, ahead: RunAhead, *parts: Any, **shape: Any) -> None:
        super().__init__(ahead, *parts, **shape)
        self.lists = lists

    def begin(self) -> Tensor:
        """Before the first round of a cycle."""
        cache, inputs = self.target.runner.cache, self.requests.inputs(self.slots, self.sampling)
        cache.note(self.slots, inputs.lengths[:, None], inputs.recent[:, 1:])
        self.lists.begin(self.slots, cache.text)
        return self.slots

    def _select(self, inputs: RoundInputs, rows: int) -> Selection:
        sparse = self.target.runner.geometry.layers - self.method.dense_layers
        self.target.runner.meter.add_extra(inputs.slots, max(0, sparse) * self.lists.nbytes(inputs.slots))
        return self.lists.select(inputs.slots, inputs.lengths + rows)


class DensePass:
    """Reads all that was run ahead, densely, and delivers what the target chooses itself.

    Args:
        requests, ahead: where requests stand; they end up behind what is delivered.
        batch: requests, padding included.
        rows: the most tokens that one of them can have run ahead.
        sampling: what the requests' sampling tells the host.
        scores: where what the rows attend to goes, if the method wants to know.

    Attributes:
        slots: int64 ``[batch]``, whose pass it is.
    """

    def __init__(
        self,
        target: FastModel,
        requests: Requests,
        ahead: RunAhead,
        *,
        batch: int,
        rows: int,
        sampling: SamplingState,
        scores: PassScores | None = None,
    ) -> None:
        self.target, self.requests, self.ahead, self.scores = target, requests, ahead, scores
        self.rows, self.sampling = rows, sampling
        self.slots = torch.full((batch,), requests.padding, device=target.runner.device)
        self.workspace = target.workspace(batch, rows)

    def run(self) -> Tensor:
        """The pass, and its report: how many tokens stand, then what is delivered, one entry more than the latter."""
        inputs = self.requests.inputs(self.slots, self.sampling)
        began, counts = self.ahead.beginning(inputs), self.ahead.counts[self.slots]
        place = torch.arange(self.rows, device=counts.device)
        own = torch.minimum(place, (counts[:, None] - 1).clamp(min=0))
        tokens = self.ahead.tokens[self.slots]
        positions = began.lengths[:, None] + own
        logits = self._logits(tokens.gather(1, own), positions, inputs)
        chosen = winners(logits, inputs.sampling, began.lengths)
        stands = (chosen == tokens[:, 1 : self.rows + 1]) & (place < counts[:, None])
        accepted = stands.long().cumprod(-1).sum(-1)
        delivered = Outcome(chosen, torch.minimum(accepted + 1, counts.clamp(min=1)))
        if self.scores is not None:
            self.scores.keep(self.slots, began.lengths, positions, delivered.counts)
        self.requests.advance(began, delivered)
        self.ahead.clear(self.slots)
        report = Outcome(torch.cat([accepted[:, None], chosen], 1), delivered.counts + 1)
        return self.requests.report(inputs, report)

    def _logits(self, tokens: Tensor, positions: Tensor, inputs: RoundInputs) -> Tensor:
        """Logits ``[batch, rows, vocab]`` of ``tokens`` at ``positions`` ``[batch, rows]``."""
        runner, slots, ends = self.target.runner, inputs.slots, inputs.lengths
        cache, attention = runner.cache, self.target.decoder.operations.dense_attention
        runner.meter.add_round(slots, ends, runner.geometry.layers)
        ends = ends.int()
        schedule = self.target.schedule_all(ends, self.workspace)

        def attend(layer: int, query: Tensor) -> Tensor:
            pool = (query, cache.keys[layer], cache.values[layer], cache.block_table, slots)
            lse = None if self.scores is None else self.scores.of(layer, query)
            where = (positions, self.target.scaling, cache.page_size)
            plan = {"workspace": self.workspace, "schedule": schedule, "settled": True}
            return attention(*pool, ends, *where, lse=lse, **plan)

        return self.target.logits(tokens, slots, positions, attend, self.rows)


def winners(logits: Tensor, sampling: SamplingState, starts: Tensor) -> Tensor:
    """Tokens ``[batch, rows]`` for ``logits`` ``[batch, rows, vocab]`` at positions from ``starts`` ``[batch]`` on.

    The likeliest; where tokens are drawn, the winners of :func:`specattn.sampling.race`.
    """
    if not sampling.sampled:
        return logits.argmax(-1)
    positions = starts[:, None] + torch.arange(logits.shape[1], device=logits.device)
    return race(warp(logits, sampling), sampling.seed, positions).argmax(-1)
