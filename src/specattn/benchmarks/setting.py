"""Where rounds are timed: a pair on the fast path, with caches for one batch and one context."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.benchmarks.imposed import imposed_nucleus
from specattn.errors import UsageError
from specattn.fast.decoder import FastDecoder
from specattn.fast.model import FastModel
from specattn.fast.requests import Requests, RoundInputs
from specattn.fast.round import FastRound
from specattn.fast.sparse_draft import SINK, DraftMemory, SparseDraftSteps, newest
from specattn.fast.speculator import unsupported
from specattn.fast.turns import TURNS
from specattn.mapping.artifact import Mapping
from specattn.plan import draft_steps
from specattn.runner import ModelRunner
from specattn.sampling import SamplingParams, SamplingState
from specattn.selection.base import Method
from specattn.selection.dense import Dense
from specattn.selection.specattn import SpecAttn
from specattn.stores.quantised_keys import quantised_keys_of

MODES = ("plain", "dense", "sparse")
"""Without a draft; with one, all tokens verified against everything; with one that says what is read."""


def check_cycles(models: Sequence[PreTrainedModel], method: Method) -> None:
    """Refuse a method whose lossless cycles have no fast path.

    Raises:
        UsageError: saying why.
    """
    reason = unsupported(method, models, lossless=True)
    if reason is not None:
        raise UsageError(f"lossless cycles of these models cannot be timed: {reason}")


def check_fast(models: Sequence[PreTrainedModel], method: Method, *, imposed: bool = False) -> SpecAttn:
    """The method, if it and the models can take the fast path.

    Args:
        imposed: whether the density is, for which there must be a nucleus.

    Raises:
        UsageError: saying why they cannot.
    """
    reason = unsupported(method, models) or _untimed(method, imposed)
    if reason is not None:
        raise UsageError(f"rounds of these models cannot be timed: {reason}")
    assert isinstance(method, SpecAttn)
    return method


def _untimed(method: Method, imposed: bool) -> str | None:
    """Why rounds with a method that has a fast path are not timed; ``None`` if they are."""
    if not isinstance(method, SpecAttn):
        return f"method {method.name!r} selects nothing that could be faster"
    if imposed and (method.tail or method.rate):
        return (
            "what a tail or a rate draws cannot be imposed; leave it out, or name a pair with trained weights"
        )
    return None


@dataclass(frozen=True)
class FastPair:
    """Two models, transformed for decoding once for all caches.

    Attributes:
        name: what rows and ratios call the pair.
        models, decoders: the target's and the draft's.
        method: how the sparse rounds select.
    """

    name: str
    models: tuple[PreTrainedModel, PreTrainedModel]
    decoders: tuple[FastDecoder, FastDecoder]
    mapping: Mapping
    method: SpecAttn

    @classmethod
    def of(
        cls,
        name: str,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        mapping: Mapping,
        method: SpecAttn,
        length: int,
    ) -> FastPair:
        """The fast form of two models for texts of up to ``length`` tokens."""
        decoders = FastDecoder(target, length), FastDecoder(draft, length)
        return cls(name, (target, draft), decoders, mapping, method)

    @property
    def vocab_size(self) -> int:
        """Token ids that both models know."""
        return min(model.config.vocab_size for model in self.models)

    def weight_bytes(self, gamma: int, method: Method) -> int:
        """Bytes of the weights that a round reads: the target's once, the draft's in each of its steps.

        A step for the sake of the last row's attention reads no output head.
        """
        target, draft = map(_read_weights, self.models)
        last = draft_steps(method, gamma) - gamma if gamma else 0
        head: Tensor = self.models[1].get_output_embeddings().weight
        return target + gamma * draft + last * (draft - head.nbytes)


class Setting:
    """Caches for ``batch`` requests of ``context`` tokens, and the rounds that decode behind them.

    Args:
        room: tokens that a round or several may add to each request.
        resident: requests that have pages of their own; the others' block tables name the same pages in another
            order. For what does not fit into memory: as many bytes are read, from places that no cache knows any more.

    Raises:
        CacheFullError: if a cache does not fit.
    """

    def __init__(
        self, pair: FastPair, batch: int, context: int, gamma: int, room: int, resident: int | None = None
    ) -> None:
        self.pair, self.batch, self.context, self.gamma = pair, batch, context, gamma
        own, length = min(resident or batch, batch), context + room
        self.resident = own
        runners = [
            ModelRunner(model, tokens=own * length, slots=batch, max_length=length, stores=stores)
            for model, stores in zip(pair.models, ((), pair.method.draft_stores), strict=True)
        ]
        for runner in runners:
            for slot in range(own):
                assert runner.cache.allocate(length) == slot
            _share_pages(runner.cache.block_table, own, batch)
        self.target, self.draft = (
            FastModel(runner, decoder, pair.vocab_size)
            for runner, decoder in zip(runners, pair.decoders, strict=True)
        )

    @property
    def runners(self) -> tuple[ModelRunner, ModelRunner]:
        """The target's and the draft's."""
        return self.target.runner, self.draft.runner

    def fill(self) -> None:
        """Put random keys and values everywhere."""
        for runner in self.runners:
            for pool in (*runner.cache.keys, *runner.cache.values):
                pool.normal_()
            if copy := quantised_keys_of(runner.cache):
                copy.follow()

    def round(self, mode: str, density: float | None = None, kind: type[FastRound] = FastRound) -> FastRound:
        """A round of all requests in one of :data:`MODES`, behind ``context`` tokens each.

        Args:
            density: the share of the context that sparse layers are to read; what the method finds if ``None``.
            kind: what it is made of.
        """
        target, draft, pair = self.target, self.draft, self.pair
        cache, device = target.runner.cache, target.runner.device
        length = cache.block_table.shape[1] * cache.page_size
        memory = None
        if mode == "sparse":
            if pair.method.draft_p < 1:
                memory = DraftMemory(draft, length)
            if density is not None:
                if memory is not None:
                    # Behind their first rounds, and not all at the same: one round is like the mean of several.
                    memory.rounds[: self.batch] = 1 + torch.arange(self.batch) % TURNS
                target, draft = self._imposed_target(density), self._imposed_draft(density)
        round = kind(
            target,
            None if mode == "plain" else draft,
            pair.method if mode == "sparse" else Dense(),
            pair.mapping,
            Requests(cache.spare_slot, device, [runner.meter for runner in self.runners]),
            batch=self.batch,
            gamma=0 if mode == "plain" else self.gamma,
            sampling=SamplingState.of([SamplingParams()] * self.batch, device),
            length=length,
            memory=memory,
        )
        round.slots.copy_(torch.arange(self.batch))
        self.place(round, [(self.context, 7 + slot, 11 + slot) for slot in range(self.batch)])
        return round

    def place(self, round: FastRound, starts: Sequence[tuple[int, int, int]]) -> None:
        """Let the requests of ``round`` have these lengths, previous and pending tokens."""
        rows = [[length, 0, previous, pending] for length, previous, pending in starts]
        round.requests.table[: self.batch].copy_(torch.tensor(rows))

    def _imposed_target(self, density: float) -> FastModel:
        """The target with a nucleus that keeps this share of the context."""
        rows, method = self.gamma + 1, self.pair.method
        return self._imposed(self.target, density, rows, method.p, method.sink, method.window + rows)

    def _imposed_draft(self, density: float) -> FastModel:
        """The same of a draft that reads a nucleus of its own; one that reads everything has none."""
        method = self.pair.method
        if method.draft_p == 1:
            return self.draft
        rows = draft_steps(method, self.gamma)
        return self._imposed(self.draft, density, rows, method.draft_p, SINK, newest(rows))

    def _imposed(
        self, model: FastModel, density: float, rows: int, p: float, sink: int, recent: int
    ) -> FastModel:
        cache = model.runner.cache
        decoder = copy.copy(model.decoder)
        nucleus = imposed_nucleus(
            decoder.operations.nucleus_lists,
            lists=(self.batch, cache.geometry.layers * cache.geometry.kv_heads),
            width=cache.block_table.shape[1] * cache.page_size,
            visible=self.context + rows,
            density=density,
            p=p,
            sink=sink,
            recent=recent,
            dtype=decoder.operations.probabilities,
            device=model.runner.device,
        )
        decoder.operations = replace(decoder.operations, nucleus_lists=nucleus)
        return replace(model, decoder=decoder)

    def reads(self) -> tuple[float, float, float]:
        """Bytes of keys and values so far, all requests: read by the target, by a dense target, by the draft."""
        target, draft = (runner.meter for runner in self.runners)
        return tuple(float(meter[: self.batch].sum()) for meter in (target.read, target.full, draft.read))  # type: ignore[return-value]


class Steady:
    """A round and its parts, again and again from where the requests, and what their draft remembers, stand now."""

    def __init__(self, round: FastRound) -> None:
        self.round = round
        self._changing = [round.requests.table]
        if isinstance(round.drafting, SparseDraftSteps):
            memory = round.drafting.memory
            self._changing += [memory.scores, memory.rounds]
        self._start = [tensor.clone() for tensor in self._changing]

    def reset(self) -> None:
        """Undo what rounds have changed."""
        for tensor, start in zip(self._changing, self._start, strict=True):
            tensor.copy_(start)

    def propose(self) -> object:
        """The draft's steps."""
        return self.round.propose(self.inputs())

    @property
    def drafts_sparsely(self) -> bool:
        """Whether the draft reads lists."""
        return isinstance(self.round.drafting, SparseDraftSteps)

    def score(self) -> None:
        """The pass over a sparse draft's keys, for the rows of its last steps."""
        assert self.round.drafting is not None
        inputs = self.inputs()
        self.round.drafting.finish(inputs.slots, inputs.lengths)

    def list(self) -> None:
        """A sparse draft's lists; its last steps are forgotten."""
        self.round.begin_draft(self.inputs())

    def select(self) -> object:
        """Mixture and nucleus, of the scores that the draft's last steps left behind."""
        round = self.round
        assert round.selector is not None and round.scores is not None
        inputs, text = self.inputs(), round.target.runner.cache.text
        return round.selector.select(round.scores, inputs.lengths, round.gamma + 1, text, inputs.slots)

    def inputs(self) -> RoundInputs:
        """What the round begins with."""
        return self.round.requests.inputs(self.round.slots, self.round.sampling)


def _share_pages(table: Tensor, own: int, batch: int) -> None:
    """Let the requests behind the first ``own`` read the pages of these, each from another page on."""
    pages = table.shape[1]
    for slot in range(own, batch):
        table[slot] = table[slot % own].roll(slot // own * pages // (batch // own + 1))


def _read_weights(model: PreTrainedModel) -> int:
    """Bytes of the weights that a pass reads: of an embedding that is no output head, only rows."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return whole if model.get_output_embeddings().weight is embedding else whole - embedding.nbytes
