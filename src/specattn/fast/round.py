"""A round without the host: every tensor has its place before the round begins, and nothing asks for a value.

So it can be captured in a CUDA graph. Where operations are references it runs as it is, which is how it is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.acceptance import verify, verify_greedy
from specattn.fast.draft import DraftSteps, ExportedScores
from specattn.fast.inputs import RoundInputs
from specattn.fast.model import FastModel, steps
from specattn.fast.selector import Selector
from specattn.mapping.artifact import Mapping
from specattn.sampling import SamplingState, Stream, sample, warp
from specattn.selection.base import Method, Selection
from specattn.selection.specattn import SpecAttn
from specattn.speculation import Outcome, Proposal


class FastRound:
    """Rounds of one shape.

    Args:
        batch: requests, padding included.
        gamma: draft tokens a round; 0 for plain decoding.
        sampling: what the requests' sampling tells the host.
        length: the most tokens that a request can have, the round's own included.
    """

    def __init__(
        self,
        target: FastModel,
        draft: FastModel | None,
        method: Method,
        mapping: Mapping | None,
        *,
        batch: int,
        gamma: int,
        sampling: SamplingState,
        length: int,
    ) -> None:
        self.target, self.method, self.gamma = target, method, gamma
        device = target.runner.device
        self.inputs = RoundInputs.allocate(batch, sampling, target.runner.cache.spare_slot, device)
        self.operations = target.decoder.operations
        self.scores: ExportedScores | None = None
        self.selector: Selector | None = None
        if isinstance(method, SpecAttn) and draft is not None and gamma:
            assert mapping is not None
            self.scores = ExportedScores.allocate(draft, method.draft_heads(mapping), batch, gamma, length)
            self.selector = Selector.allocate(
                method, mapping, self.operations, target.runner.geometry, batch, length
            )
        self.drafting = None
        if draft is not None:
            self.drafting = DraftSteps(draft, self.operations, batch, length, self.scores)

    def run(self) -> Outcome:
        """The round of the requests in ``inputs``: tokens ``[batch, gamma + 1]`` and counts ``[batch]``."""
        proposal = self._propose()
        tokens = self.inputs.recent[:, 1:]
        if proposal is not None:
            tokens = torch.cat([tokens, proposal.tokens], 1)
        logits = self._verify(tokens)
        if proposal is None:
            token = self._choose(logits, Stream.NEXT, 0)[0]
            return Outcome(token, torch.ones_like(token[:, 0]))
        if not self.inputs.sampling.sampled:
            return Outcome.of(proposal.tokens, verify_greedy(proposal.tokens, logits.argmax(-1)))
        draws = self.inputs.batch
        verdict = verify(
            proposal.tokens,
            proposal.probabilities,
            warp(logits, self.inputs.sampling),
            draws.uniform(Stream.ACCEPT, torch.arange(self.gamma, device=tokens.device)),
            draws.uniform(Stream.NEXT, 0),
        )
        return Outcome.of(proposal.tokens, verdict)

    def _propose(self) -> Proposal | None:
        if self.drafting is None:
            return None
        fed, starts = self.inputs.recent, self.inputs.lengths - 1
        tokens, probabilities = [], []
        # A round without proposals still feeds the draft, so that its cache keeps up.
        for row in range(max(self.gamma, 1)):
            logits = self.drafting.logits(fed, self.inputs.slots, starts, row)
            fed, probs = self._choose(logits, Stream.DRAFT, row)
            starts = self.inputs.lengths + row + 1
            tokens.append(fed)
            probabilities.append(probs)
        return Proposal(torch.cat(tokens, 1), torch.cat(probabilities, 1)) if self.gamma else None

    def _choose(self, logits: Tensor, stream: Stream, draw: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, 1]`` for ``logits`` ``[batch, 1, vocab]``, and what they were drawn from, if they were."""
        if not self.inputs.sampling.sampled:
            return logits.argmax(-1), logits[..., :0]
        probs = warp(logits, self.inputs.sampling)
        return sample(probs, self.inputs.batch.uniform(stream, draw)[:, None]), probs

    def _verify(self, tokens: Tensor) -> Tensor:
        """The target's logits ``[batch, gamma + 1, vocab]`` for the pending token and the proposals."""
        lengths, slots, rows = self.inputs.lengths, self.inputs.slots, tokens.shape[1]
        selection = None
        if self.selector is not None and self.scores is not None:
            selection = self.selector.select(self.scores, lengths, rows)
        self._count(selection, rows)
        cache, positions = self.target.runner.cache, steps(lengths, rows)
        ends = (lengths + rows).int()

        def attend(layer: int, query: Tensor) -> Tensor:
            pool = (query, cache.keys[layer], cache.values[layer], cache.block_table, slots)
            where = (positions, self.target.scaling, cache.page_size)
            if selection is None or self.method.is_dense(layer):
                return self.operations.dense_attention(*pool, ends, *where)
            return self.operations.sparse_attention(*pool, selection.of_layer(layer), *where)

        return self.target.logits(tokens, slots, positions, attend, rows)

    def _count(self, selection: Selection | None, rows: int) -> None:
        """Account for what the round reads, all layers at once."""
        slots, lengths, target = self.inputs.slots, self.inputs.lengths, self.target.runner
        layers = target.geometry.layers
        dense = layers if selection is None else sum(map(self.method.is_dense, range(layers)))
        target.meter.add_round(slots, lengths + rows, dense, selection)
        if self.drafting is not None:
            draft = self.drafting.model.runner
            for row in range(max(self.gamma, 1)):
                draft.meter.add_round(slots, lengths + 1 + row, draft.geometry.layers, None)
