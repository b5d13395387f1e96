"""A round without the host: every tensor has its place before the round begins, and nothing asks for a value.

So it can be captured in a CUDA graph. Where operations are references it runs as it is, which is how it is tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specattn.acceptance import Verdict, verify, verify_greedy
from specattn.fast.draft import DraftSteps, ExportedScores
from specattn.fast.model import FastModel, steps
from specattn.fast.requests import Requests, RoundInputs
from specattn.fast.selector import Scores, Selector
from specattn.fast.sparse_draft import DraftMemory, SparseDraftSteps
from specattn.kernels.echoes import following
from specattn.mapping.artifact import Mapping
from specattn.plan import draft_steps
from specattn.sampling import SamplingState, Stream, sample, warp
from specattn.selection.base import Method, Selection
from specattn.selection.specattn import SpecAttn
from specattn.speculation import Outcome, Proposal

if TYPE_CHECKING:
    from specattn.kernels.schedule import Schedule


class FastRound:
    """Rounds of one shape.

    Args:
        requests: where requests stand; a round moves its own on.
        batch: requests of a round, padding included.
        gamma: draft tokens a round; 0 for plain decoding.
        sampling: what the requests' sampling tells the host.
        length: the most tokens that a request can have, the round's own included.
        memory: where a sparse draft's lists come from; needed with ``draft_p`` below 1.

    Attributes:
        slots: int64 ``[batch]``, whose round it is: padding alone, until somebody writes.
        draft_rows: steps of the draft, if there is one.
    """

    def __init__(
        self,
        target: FastModel,
        draft: FastModel | None,
        method: Method,
        mapping: Mapping | None,
        requests: Requests,
        *,
        batch: int,
        gamma: int,
        sampling: SamplingState,
        length: int,
        memory: DraftMemory | None = None,
    ) -> None:
        self.target, self.method, self.gamma = target, method, gamma
        self.draft_rows = rows = draft_steps(method, gamma)
        self.requests, self.sampling = requests, sampling
        self.slots = torch.full((batch,), requests.padding, device=target.runner.device)
        self.operations = target.decoder.operations
        self.workspace = target.workspace(batch, rows=gamma + 1)
        self.scores: Scores | None = None
        self.selector: Selector | None = None
        self.drafting: DraftSteps | SparseDraftSteps | None = None
        exported, heads = None, None
        selects = isinstance(method, SpecAttn) and draft is not None and gamma
        if selects:
            assert isinstance(method, SpecAttn) and mapping is not None
            heads = method.draft_heads(mapping)
            self.selector = Selector.allocate(
                method, mapping, self.operations, target.runner.geometry, batch, length
            )
        if draft is not None and gamma and method.draft_p < 1:
            assert memory is not None
            used = heads if selects else torch.zeros(0, dtype=torch.int64)
            sparse = SparseDraftSteps(draft, memory, used, p=method.draft_p, batch=batch, rows=rows)
            self.drafting, self.scores = sparse, sparse.scores
        elif selects:
            assert draft is not None
            self.scores = exported = ExportedScores.allocate(draft, heads, batch, rows, length)
        if self.drafting is None and draft is not None:
            self.drafting = DraftSteps(draft, batch, length, exported)

    def run(self) -> Tensor:
        """The round of the requests in ``slots``, and its report, see :meth:`Requests.report`."""
        inputs = self.requests.inputs(self.slots, self.sampling)
        outcome = self.outcome(inputs)
        self.requests.advance(inputs, outcome)
        return self.requests.report(inputs, outcome)

    def outcome(self, inputs: RoundInputs) -> Outcome:
        """What a round yields that begins with ``inputs``; nobody is moved on."""
        proposal = self.propose(inputs)
        tokens = inputs.recent[:, 1:]
        if proposal is not None:
            tokens = torch.cat([tokens, proposal.tokens], 1)
        logits = self.target_logits(inputs, tokens)
        if proposal is None:
            token = self._choose(inputs, logits, Stream.NEXT, 0)[0]
            return Outcome(token, torch.ones_like(token[:, 0]))
        return Outcome.of(proposal.tokens, self._judge(inputs, proposal, logits))

    def _judge(self, inputs: RoundInputs, proposal: Proposal, logits: Tensor) -> Verdict:
        """Which of the proposed tokens stand, by the target's ``logits``."""
        if not inputs.sampling.sampled:
            return verify_greedy(proposal.tokens, logits.argmax(-1))
        draws = inputs.batch
        return verify(
            proposal.tokens,
            proposal.probabilities,
            warp(logits, inputs.sampling),
            draws.uniform(Stream.ACCEPT, torch.arange(self.gamma, device=logits.device)),
            draws.uniform(Stream.NEXT, 0),
        )

    def begin_draft(self, inputs: RoundInputs) -> None:
        """What comes before the draft's first step: a sparse draft's lists."""
        if self.drafting is not None:
            self.drafting.begin(inputs.slots, inputs.lengths, self._draft_echoes(inputs))

    def propose(self, inputs: RoundInputs) -> Proposal | None:
        """The draft's tokens, if there are to be any; its scores are left behind for the selection."""
        if self.drafting is None:
            return None
        fed, starts = inputs.recent, inputs.lengths - 1
        self.begin_draft(inputs)
        tokens, probabilities = [], []
        # A round without proposals still feeds the draft, so that its cache keeps up.
        for row in range(max(self.gamma, 1)):
            logits = self.drafting.logits(fed, inputs.slots, starts, row)
            fed, probs = self._choose(inputs, logits, Stream.DRAFT, row)
            starts = inputs.lengths + (row + 1)
            tokens.append(fed)
            probabilities.append(probs)
        if self.draft_rows > len(tokens):
            self.drafting.read(fed, inputs.slots, starts, self.gamma)
        self.drafting.finish(inputs.slots, inputs.lengths)
        return Proposal(torch.cat(tokens, 1), torch.cat(probabilities, 1)) if self.gamma else None

    def _draft_echoes(self, inputs: RoundInputs) -> Tensor | None:
        """Where a draft with lists of its own may have to look that copies: a dense one sees it anyway.

        As many tokens behind each earlier occurrence of the pending token as there are steps, which will most likely be
        fed these.
        """
        if self.method.echo == 0 or self.method.draft_p == 1:
            return None
        cache, slots, lengths = self.target.runner.cache, inputs.slots, inputs.lengths
        cache.note(slots, lengths[:, None], inputs.recent[:, 1:])
        found = self.operations.echoes(cache.text, slots, lengths, 1, self.method.echo)
        return following(found, self.draft_rows)

    def _choose(
        self, inputs: RoundInputs, logits: Tensor, stream: Stream, draw: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, 1]`` for ``logits`` ``[batch, 1, vocab]``, and what they were drawn from, if they were."""
        if not inputs.sampling.sampled:
            return logits.argmax(-1), logits[..., :0]
        probs = warp(logits, inputs.sampling)
        return sample(probs, inputs.batch.uniform(stream, draw)[:, None]), probs

    def target_logits(self, inputs: RoundInputs, tokens: Tensor) -> Tensor:
        """The target's logits ``[batch, gamma + 1, vocab]`` for the pending token and the proposals."""
        lengths, slots, rows = inputs.lengths, inputs.slots, tokens.shape[1]
        cache, positions = self.target.runner.cache, steps(lengths, rows)
        cache.note(slots, positions, tokens)
        selection = self._select(inputs, rows)
        ends = (lengths + rows).int()
        self._count(inputs, selection, ends)
        dense, sparse = self._schedules(selection, ends)

        def attend(layer: int, query: Tensor) -> Tensor:
            pool = (query, cache.keys[layer], cache.values[layer], cache.block_table, slots)
            where = (positions, self.target.scaling, cache.page_size)
            if selection is None or self.method.is_dense(layer):
                return self.operations.dense_attention(
                    *pool, ends, *where, workspace=self.workspace, schedule=dense, settled=True
                )
            lists, schedule = selection.of_layer(layer), sparse and sparse.of_layer(layer)
            return self.operations.sparse_attention(
                *pool, lists, *where, workspace=self.workspace, schedule=schedule, settled=True
            )

        return self.target.logits(tokens, slots, positions, attend, rows)

    def _select(self, inputs: RoundInputs, rows: int) -> Selection | None:
        """The lists ``[batch, layers, kv_heads, ...]`` of the target's pass, if it is to have any."""
        if self.selector is None or self.scores is None:
            return None
        text = self.target.runner.cache.text
        return self.selector.select(self.scores, inputs.lengths, rows, text, inputs.slots)

    def _schedules(
        self, selection: Selection | None, ends: Tensor
    ) -> tuple[Schedule | None, Schedule | None]:
        """Of the dense layers, and of those that read ``selection``."""
        layers = range(self.target.runner.geometry.layers)
        dense = sparse = None
        if selection is None or any(map(self.method.is_dense, layers)):
            dense = self.target.schedule_all(ends, self.workspace)
        if selection is not None:
            sparse = self.operations.schedule(selection.counts, self.workspace, listed=True)
        return dense, sparse

    def _count(self, inputs: RoundInputs, selection: Selection | None, ends: Tensor) -> None:
        """Account for what the round reads, all layers at once."""
        slots, target = inputs.slots, self.target.runner
        layers = target.geometry.layers
        dense = layers if selection is None else sum(map(self.method.is_dense, range(layers)))
        listed = None if selection is None else selection.counts[:, dense:].sum((1, 2), dtype=torch.int32)
        target.meter.add_round(slots, ends, dense, listed)
        if self.drafting is not None:
            self.drafting.count(slots, inputs.lengths, self.draft_rows)
