"""A round on a real paged cache: ragged requests on scattered pages, and NaN wherever nobody may look."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specattn import cache as cache_module
from specattn.attention import DenseAttend, Step, StepSource
from specattn.cache import PagedKVCache
from specattn.draft_attention import DraftAttention
from specattn.geometry import KVGeometry
from specattn.mapping import Mapping
from specattn.selection.base import LayerState, Method, RoundState
from specattn.stores.base import StoreSpec, pool_page

SCALING = 0.25


@dataclass(frozen=True)
class PagedRound:
    """What a method finds in the target's pass of a round, the round's own tokens appended.

    Attributes:
        step: the pass; ``step.cache`` is the cache and ``step.slots`` are the requests' slots.
        seed: of the queries; keys and values were drawn from it too.
    """

    geometry: KVGeometry
    lengths: list[int]
    rows: int
    step: Step
    seed: int

    @property
    def source(self) -> StepSource:
        """Keys, values and stores, as the engine offers them."""
        return StepSource(self.step)

    def state(self, draft: DraftAttention | None = None, mapping: Mapping | None = None) -> RoundState:
        """The round before the target's pass."""
        return RoundState(
            starts=torch.tensor(self.lengths, dtype=torch.int32),
            rows=self.rows,
            max_length=max(self.lengths) + self.rows,
            layers=self.geometry.layers,
            kv_heads=self.geometry.kv_heads,
            query_heads=self.geometry.query_heads,
            draft=draft,
            mapping=mapping,
        )

    def layer(self, method: Method, layer: int, state: RoundState | None = None) -> LayerState:
        """What ``method.select`` is given in ``layer``; ``prepare`` has run."""
        state = state or self.state()
        return LayerState(state, method.prepare(state), layer, self.queries(layer), SCALING, self.source)

    def queries(self, layer: int) -> Tensor:
        """``[batch, rows, query_heads, head_dim]``, each request's its own."""
        shape = (self.rows, self.geometry.query_heads, self.geometry.head_dim)
        drawn = [torch.randn(shape, generator=_generator(self.seed, n, 1 + layer)) for n in self.lengths]
        return torch.stack(drawn).to(self.geometry.dtype)


def paged_round(
    geometry: KVGeometry,
    lengths: Sequence[int],
    rows: int,
    stores: Sequence[StoreSpec] = (),
    seed: int = 0,
    page_size: int | None = None,
    *,
    rejected: int = 0,
) -> PagedRound:
    """A round of ``rows`` rows behind ``lengths`` tokens.

    Keys, values and queries of a request depend on ``seed`` and its length alone, so that a request is the same in
    any batch, on any pages and with any stores. A request whose keys and values were NaN has held every page before,
    so pool and stores hold NaN, or what they make of it, outside of what was written since.

    Args:
        rejected: tokens that every request took in behind its ``lengths`` and that were rolled back.
    """
    lengths = list(lengths)
    room = max(lengths) + max(rows, rejected)
    tokens = 2 * len(lengths) * room  # twice what is needed: pages to spare between those in use
    page_size = page_size or pool_page(stores)
    cache = PagedKVCache(
        geometry,
        tokens=tokens,
        slots=len(lengths),
        max_length=tokens + len(lengths) * page_size,  # all there is, for the request that spoils it
        stores=stores,
        page_size=page_size,
    )
    _poison(cache)
    with mock.patch.object(cache_module, "_take_pages", _Scattered(seed)):
        slots = [cache.allocate(length + max(rows, rejected)) for length in lengths]
    for slot, length in zip(slots, lengths, strict=True):
        keys, values = contents(geometry, length, rows, seed)
        append(cache, [slot], [0], keys[:, None, :, :length], values[:, None, :, :length])
        if rejected:
            wild = 10 * torch.ones(geometry.layers, 1, geometry.kv_heads, rejected, geometry.head_dim)
            append(cache, [slot], [length], wild, wild)
            cache.set_length(slot, length)
    own = [contents(geometry, length, rows, seed) for length in lengths]
    keys, values = (
        torch.stack([pair[i][:, :, -rows:] for pair in own], 1) for i in range(2)
    )  # [layers, batch, kv_heads, rows, head_dim]
    append(cache, slots, lengths, keys, values)
    return PagedRound(geometry, lengths, rows, _step(cache, slots, lengths, rows), seed)


def contents(geometry: KVGeometry, length: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[layers, kv_heads, length + rows, head_dim]`` of a request, the round's own tokens last."""
    shape = (geometry.layers, geometry.kv_heads, length + rows, geometry.head_dim)
    keys, values = torch.randn(2, *shape, generator=_generator(seed, length, 0)).to(geometry.dtype)
    return keys, values


def append(
    cache: PagedKVCache, slots: Sequence[int], starts: Sequence[int], keys: Tensor, values: Tensor
) -> None:
    """Append ``keys`` and ``values`` ``[layers, batch, kv_heads, n, head_dim]`` behind ``starts``, as a pass does."""
    step = _step(cache, slots, starts, keys.shape[3])
    for layer in range(len(keys)):
        cache.append(
            layer,
            step.slots,
            step.positions,
            step.pool_rows,
            keys[layer].to(cache.geometry.dtype),
            values[layer].to(cache.geometry.dtype),
        )
    for slot, start in zip(slots, starts, strict=True):
        cache.set_length(slot, start + keys.shape[3])


def _step(cache: PagedKVCache, slots: Sequence[int], starts: Sequence[int], rows: int) -> Step:
    slot_ids = torch.tensor(slots)
    positions = torch.tensor(starts)[:, None] + torch.arange(rows)
    return Step(
        cache=cache,
        slots=slot_ids,
        host_slots=list(slots),
        starts=list(starts),
        positions=positions,
        text_positions=positions,
        pool_rows=cache.rows(slot_ids, positions),
        attend=DenseAttend(),
    )


def _poison(cache: PagedKVCache) -> None:
    """Let a request of NaN have held all pages."""
    for pool in (*cache.keys, *cache.values):
        pool.fill_(float("nan"))
    geometry = cache.geometry
    tokens = cache.keys[0].shape[0] - cache.page_size  # page 0 is nobody's
    slot = cache.allocate(tokens)
    poison = torch.full((geometry.layers, 1, geometry.kv_heads, tokens, geometry.head_dim), float("nan"))
    append(cache, [slot], [0], poison, poison)
    cache.free(slot)


class _Scattered:
    """Hands out free pages at random, in random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, free: set[int], count: int) -> list[int]:
        pages = self.random.sample(sorted(free), count)
        free.difference_update(pages)
        return pages


@contextmanager
def no_answers() -> Iterator[None]:
    """Inside the block nothing may ask the device for a value, nor make a shape that depends on one."""
    with _NoAnswers(), mock.patch.object(Tensor, "tolist", lambda self: _refuse("tolist")):
        yield


class _NoAnswers(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or str(func) in _QUESTIONS:
            _refuse(str(func))
        return func(*args, **(kwargs or {}))


_QUESTIONS = {
    f"aten.{name}"
    for name in (
        "_local_scalar_dense.default",
        "equal.default",
        "masked_select.default",
        "nonzero.default",
        "repeat_interleave.Tensor",
        "_unique2.default",
    )
}


def _refuse(what: str) -> None:
    raise AssertionError(f"{what} asks the device for a value")


def _generator(seed: int, length: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1000 + stream) * 100_000 + length)
