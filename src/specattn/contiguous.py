"""Keys and values that lie in one tensor, as transformers' own caches hold them, in the role of a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError
from specattn.geometry import KVGeometry
from specattn.stores.base import LARGEST_PAGE, SideStore, StoreSpec


@dataclass(frozen=True)
class ContiguousSource:
    """One layer's keys and values of a batch, with padding before each request's first token.

    Attributes:
        layer: its number.
        all_keys, all_values: ``[batch, kv_heads, columns, head_dim]``.
        first, lengths: int64 ``[batch]``, the column of the first token, and how many follow.
    """

    layer: int
    all_keys: Tensor
    all_values: Tensor
    first: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, layer: int, key: Tensor, value: Tensor, mask: Tensor | None) -> ContiguousSource:
        """The source behind an attention call with the boolean ``mask`` ``[batch, 1, rows, columns]``.

        Raises:
            UsageError: if the mask hides tokens between others.
        """
        batch, columns = key.shape[0], key.shape[2]
        if mask is None:
            lengths = torch.full((batch,), columns, device=key.device)
            return cls(layer, key, value, torch.zeros_like(lengths), lengths)
        seen = mask[:, 0, -1, :columns].expand(batch, -1)
        first, lengths = seen.int().argmax(-1), seen.sum(-1)
        last = columns - 1 - seen.flip(-1).int().argmax(-1)
        if bool((last - first + 1 != lengths).any()):
            raise UsageError("attention_mask hides tokens between others; pad the prompts on the left")
        return cls(layer, key, value, first, lengths)

    @property
    def columns(self) -> int:
        """The longest request, or more."""
        return self.all_keys.shape[2]

    def keys(self, layer: int) -> list[Tensor]:
        """Keys ``[length, kv_heads, head_dim]`` of each request."""
        return self._spans(self.all_keys)

    def gather(self, layer: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, n, head_dim]`` of the tokens ``indices``."""
        columns = (indices.clamp(min=0) + self.first[:, None, None]).long()[..., None]
        columns = columns.expand(-1, -1, -1, self.all_keys.shape[-1])
        return self.all_keys.gather(2, columns), self.all_values.gather(2, columns)

    def rows(self, positions: Tensor) -> Tensor:
        """Rows of the token ``positions`` ``[batch, ...]`` in the pool that stores are made for."""
        return _rows(torch.arange(len(self.lengths), device=positions.device), positions, self._width)

    def store(self, spec: StoreSpec) -> SideStore:
        """A store of these keys, made on the spot."""
        requests = self.keys(self.layer)
        pool = _Pool.of(self.layer, requests, self._spans(self.all_values), self._width)
        store = spec.build(pool)
        for slot, keys in enumerate(requests):
            slots = torch.tensor([slot], device=keys.device)
            positions = torch.arange(len(keys), device=keys.device)[None]
            store.append(
                self.layer, slots, positions, pool.rows(slots, positions), keys.transpose(0, 1)[None]
            )
        return store

    def _spans(self, columns: Tensor) -> list[Tensor]:
        """What each request has of ``[batch, kv_heads, columns, head_dim]``: ``[length, kv_heads, head_dim]``."""
        spans = zip(self.first.tolist(), self.lengths.tolist(), strict=True)
        return [columns[b, :, f : f + n].transpose(0, 1) for b, (f, n) in enumerate(spans)]

    @property
    def _width(self) -> int:
        """Rows a request: whole pages, whatever their size."""
        return -(-self.columns // LARGEST_PAGE) * LARGEST_PAGE


@dataclass(frozen=True)
class _Pool:
    """The requests of one layer, each at a multiple of ``width`` rows; the other layers are empty."""

    width: int
    geometry: KVGeometry
    device: torch.device
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def of(cls, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor], width: int) -> _Pool:
        _, kv_heads, head_dim = keys[0].shape
        geometry = KVGeometry(layer + 1, kv_heads, kv_heads, head_dim, keys[0].dtype)
        pools = [_spread(requests, width) for requests in (keys, values)]
        return cls(width, geometry, keys[0].device, *([pool[:0]] * layer + [pool] for pool in pools))

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        return _rows(slots, positions, self.width)


def _spread(requests: Sequence[Tensor], width: int) -> Tensor:
    """Tensors ``[length, ...]`` in one, each at a multiple of ``width`` rows."""
    pool = requests[0].new_zeros(len(requests) * width, *requests[0].shape[1:])
    for slot, request in enumerate(requests):
        pool[slot * width : slot * width + len(request)] = request
    return pool


def _rows(slots: Tensor, positions: Tensor, width: int) -> Tensor:
    return slots.view(-1, *[1] * (positions.dim() - 1)) * width + positions
