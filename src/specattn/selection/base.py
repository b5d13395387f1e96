"""The contract between a selection method and everything around it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from specattn.registry import Member
from specattn.selection.checks import check_at_least

if TYPE_CHECKING:
    from specattn.draft_attention import DraftAttention
    from specattn.mapping import Mapping
    from specattn.stores.base import SideStore, StoreSpec
    from specattn.target_scores import StoredScores


@dataclass(frozen=True)
class PseudoTokens:
    """What stands for tokens that are not read. All rows of the round see them, so they are older than it.

    Attributes:
        keys, values: float32 ``[batch, kv_heads, n, head_dim]``.
        log_weights: float32 ``[batch, kv_heads, n]``, added to the logits: the logarithm of how many tokens each
            stands for, -inf if for none.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Selection:
    """The KV rows that one layer of the target reads in one round.

    Attributes:
        indices: int32 ``[batch, kv_heads, capacity]``, ascending token positions, the tail padded with -1.
        counts: int32 ``[batch, kv_heads]``, how many entries of ``indices`` are valid; stays on the device.
        log_weights: optional ``[batch, kv_heads, capacity]``, added to the attention logits; 0 for tokens
            that stand for themselves alone.
        extra_bytes: what choosing them read beside keys and values (page summaries, quantised keys), bytes a
            request: a number or float64 ``[batch]``.
        pseudo: what stands for the others, if anything does.
        capped: optional bool ``[batch, kv_heads]``: lists that a limit keeps shorter than the method's promise asks.
    """

    indices: Tensor
    counts: Tensor
    log_weights: Tensor | None = None
    extra_bytes: Tensor | float = 0.0
    pseudo: PseudoTokens | None = None
    capped: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> Selection:
        """The selection that a boolean mask ``[batch, kv_heads, length]`` describes; capacity is ``length``."""
        rank = mask.cumsum(-1, dtype=torch.int32)
        length = mask.shape[-1]
        positions = torch.arange(length, dtype=torch.int32, device=mask.device).expand_as(rank)
        # Unselected positions all land in one spare column, which is cut off again.
        column = torch.where(mask, rank - 1, length).long()
        indices = torch.full((*mask.shape[:-1], length + 1), -1, dtype=torch.int32, device=mask.device)
        indices.scatter_(-1, column, positions)
        return cls(indices[..., :length], rank[..., -1].contiguous())

    def of_layer(self, layer: int) -> Selection:
        """The lists of one layer, of a selection ``[batch, layers, kv_heads, ...]`` of all."""
        weights = None if self.log_weights is None else self.log_weights[:, layer]
        return Selection(self.indices[:, layer], self.counts[:, layer], weights)

    def for_heads(self, kv_heads: int) -> Selection:
        """The same lists for every KV head, of a selection ``[batch, 1, capacity]``."""
        assert self.log_weights is None, "weights are made for one head at a time"
        return Selection(self.indices.expand(-1, kv_heads, -1), self.counts.expand(-1, kv_heads))

    def padded(self) -> Selection:
        """The same with the tail's -1, if whoever made the lists has left it out."""
        place = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return replace(self, indices=self.indices.masked_fill(place >= self.counts[..., None], -1))

    def narrowed(self, mask: Tensor) -> Selection:
        """The entries that ``mask`` ``[batch, kv_heads, capacity]`` keeps; padding stays out."""
        assert self.log_weights is None, "weights are made for the final list"
        assert self.pseudo is None, "what stands for the others is made for the final list"
        kept = Selection.from_mask(mask & (self.indices >= 0))
        chosen = self.indices.gather(-1, kept.indices.clamp(min=0).long())
        return Selection(chosen.masked_fill(kept.indices < 0, -1), kept.counts)

    def to_mask(self, length: int) -> Tensor:
        """The boolean mask ``[batch, kv_heads, length]`` of the selected positions."""
        shape = (*self.indices.shape[:-1], length + 1)
        column = torch.where(self.indices < 0, length, self.indices).long()
        mask = torch.zeros(shape, dtype=torch.bool, device=self.indices.device).scatter_(-1, column, True)
        return mask[..., :length]


class Need(enum.Flag):
    """What a method wants computed for it; nothing else is."""

    NOTHING = 0
    DRAFT = enum.auto()
    """The draft's attention rows of the round."""
    EVERY_ROW = enum.auto()
    """Of the round's last row too: one more step of the draft, whose proposal is not used."""
    MAPPING = enum.auto()
    """The calibrated map between the two models."""
    SCORES = enum.auto()
    """What the target attended to in its last dense pass."""
    TEXT = enum.auto()
    """The tokens so far, those that the round is fed among them."""


class KeySource(Protocol):
    """Where a method finds the keys and values of the visible context, and what is derived from them."""

    def keys(self, layer: int) -> list[Tensor]:
        """Keys of one layer, a tensor ``[length, kv_heads, head_dim]`` for each request (a view where it can be)."""
        ...

    def gather(self, layer: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, n, head_dim]`` of the tokens ``indices`` ``[batch, kv_heads, n]``.

        An index of -1 reads token 0.
        """
        ...

    def rows(self, positions: Tensor) -> Tensor:
        """Pool rows, int64, of the token ``positions`` ``[batch, ...]``: where side stores keep what is theirs."""
        ...

    def store(self, spec: StoreSpec) -> SideStore:
        """The side store that the method asked for in :attr:`Method.stores`."""
        ...


@dataclass(frozen=True)
class RoundState:
    """What is known before the target's pass of a round.

    Attributes:
        starts: int32 ``[batch]``, tokens in the target's cache before the round, on the device.
        rows: rows that the target verifies, gamma + 1.
        max_length: an upper bound, known to the host, of ``starts + rows``.
        layers, kv_heads, query_heads: the target's geometry.
        draft: the draft's attention rows of this round, if the method needs them.
        mapping: the calibrated map, if the method needs it.
        scores: the target's in its last dense pass, if the method needs them.
        text: int32 ``[slots, length]``, and whose it is, ``slots`` ``[batch]``, if the method needs it; the round's own
            tokens are there when its pass has begun.
    """

    starts: Tensor
    rows: int
    max_length: int
    layers: int
    kv_heads: int
    query_heads: int
    draft: DraftAttention | None = None
    mapping: Mapping | None = None
    scores: StoredScores | None = None
    text: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> Tensor:
        """int32 ``[batch]``: visible tokens at the end of the round."""
        return self.starts + self.rows


@dataclass(frozen=True)
class LayerState:
    """What a method may use to select for one layer: the round, what ``prepare`` returned, and this layer's queries.

    Attributes:
        queries: ``[batch, rows, query_heads, head_dim]``, after the position embedding.
        scaling: the factor of the attention logits.
    """

    round: RoundState
    prepared: object
    layer: int
    queries: Tensor
    scaling: float
    source: KeySource


@dataclass(frozen=True)
class Method(Member):
    """A selection method: its options are the fields of a frozen dataclass.

    Attributes:
        dense_layers: the first layers, which read everything (2 in Quest and in the paper).
    """

    selects: ClassVar[bool] = True
    """Whether ``select`` returns plain lists, so that another method may wrap this one and narrow them further."""

    draft_p = 1.0
    """Share of its own attention that the draft reads in its steps. No option, but of methods that say so."""

    echo = 0
    """How many occurrences of a token that was fed are followed. No option, but of methods that say so."""

    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_at_least(self.name, "dense_layers", self.dense_layers, 0)

    @property
    def needs(self) -> Need:
        """What must be computed for it in every round."""
        return Need.NOTHING

    @property
    def wrappable(self) -> bool:
        """:attr:`selects`, with these options."""
        return self.selects

    @property
    def promised_error(self) -> float | None:
        """The relative error of each query's output that the method promises to keep, but for a few; if it does."""
        return None

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        """What must be kept beside the target's cache for it: page bounds, quantised keys."""
        return ()

    @property
    def draft_stores(self) -> tuple[StoreSpec, ...]:
        """The same beside the draft's cache."""
        return ()

    def prepare(self, state: RoundState) -> object:
        """Work done once a round for all layers, before the target's pass. The result reaches ``select``."""
        return None

    def select(self, state: LayerState) -> Selection:
        """The tokens that ``state.layer`` reads in this round. Must contain the round's own tokens."""
        raise NotImplementedError

    def draft_heads(self, mapping: Mapping | None) -> Tensor | None:
        """The draft heads whose scores the method uses: int64 ``[n]`` of ``layer * heads + head``; all if ``None``."""
        return None

    def reads_everything(self, rounds: int) -> bool:
        """Whether a request reads everything that had its last dense pass ``rounds`` rounds ago, this one included."""
        return False

    def is_dense(self, layer: int) -> bool:
        """Whether ``layer`` reads everything."""
        return layer < self.dense_layers
