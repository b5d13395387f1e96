"""Where the tokens of a decoding batch lie in the paged KV cache, as kernels are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specattn.errors import UsageError


@dataclass(frozen=True)
class PagedBatch:
    """The requests of a launch. Everything but the shapes stays on the device, so a graph can be replayed.

    Attributes:
        block_table: int32 ``[slots, pages]``, see :class:`specattn.cache.PagedKVCache`.
        slots: integer ``[batch]``, a row of the table for each request.
        lengths: int32 ``[batch]``, tokens that a request's last query row sees, its own included; 0 for padding
            of the batch, whose slot may be any.
        page_size: tokens a page.
    """

    block_table: Tensor
    slots: Tensor
    lengths: Tensor
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.slots.shape != self.lengths.shape or self.slots.dim() != 1:
            raise UsageError(
                f"slots {list(self.slots.shape)} and lengths {list(self.lengths.shape)} differ: "
                "both need one entry a request"
            )
        if not (self.slots.is_contiguous() and self.lengths.is_contiguous()):
            raise UsageError("slots and lengths must be contiguous: kernels read them one after the other")
        if self.page_size < 1:
            raise UsageError(f"page_size={self.page_size} is below 1: use the cache's")

    def __len__(self) -> int:
        return self.slots.shape[0]

    def rows(self, request: int, positions: Tensor) -> Tensor:
        """Pool rows, int64, of token ``positions`` of ``request``: for references."""
        page = self.block_table[self.slots[request].long(), (positions // self.page_size).long()]
        return page.long() * self.page_size + positions % self.page_size

    def visible_rows(self, request: int) -> Tensor:
        """Pool rows of all that ``request`` sees. Asks the device for the length: for references."""
        length = int(self.lengths[request])
        return self.rows(request, torch.arange(length, device=self.lengths.device))


def check_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Refuse a ``tensor`` that does not have ``shape``, where ``None`` fits anything.

    Raises:
        UsageError: naming both shapes.
    """
    fits = len(shape) == tensor.dim() and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise UsageError(f"{name} has shape {list(tensor.shape)}: [{wanted}] is needed")


def check_power_of_two(name: str, value: int, least: int = 1) -> None:
    """Refuse a size that a tile cannot have.

    Raises:
        UsageError: naming the value and the limit.
    """
    if value < least or value & (value - 1):
        raise UsageError(f"{name}={value}: the kernel takes powers of two from {least} on")
