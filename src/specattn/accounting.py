"""How many bytes of KV-side state attention has read, request by request."""

from __future__ import annotations

import torch
from torch import Tensor

from specattn.geometry import KVGeometry
from specattn.selection.base import Selection


class ReadMeter:
    """Counts, on the device, what a model's attention reads and what dense attention would have read.

    A list that the rows of a round share counts once. A sliding-window layer counts its window in both figures.

    Attributes:
        read, full: float64 ``[slots]``, bytes since :meth:`reset` of the slot.
    """

    def __init__(self, geometry: KVGeometry, slots: int, device: torch.device | str) -> None:
        self.geometry = geometry
        self.read = torch.zeros(slots, dtype=torch.float64, device=device)
        self.full = torch.zeros(slots, dtype=torch.float64, device=device)

    def reset(self, slot: int) -> None:
        """Start a new request in ``slot``."""
        self.read[slot] = 0
        self.full[slot] = 0

    def add_dense(
        self, slots: Tensor, positions: Tensor, window: int | None, text_positions: Tensor | None = None
    ) -> None:
        """A layer that read all that its rows at ``positions`` ``[batch, rows]`` can see.

        Where tokens were evicted, the rows' ``text_positions`` say what they would have seen.
        """
        full = positions if text_positions is None else text_positions
        self.read.index_add_(0, slots, self._layer_bytes(positions, window))
        self.full.index_add_(0, slots, self._layer_bytes(full, window))

    def add_scores(self, slots: Tensor, positions: Tensor) -> None:
        """A layer that also read a float32 score of each token that its rows can see, for each KV head."""
        nbytes = (positions[:, -1].double() + 1) * (self.geometry.kv_heads * torch.float32.itemsize)
        self.read.index_add_(0, slots, nbytes)

    def add_selection(self, slots: Tensor, positions: Tensor, selection: Selection) -> None:
        """A layer that read ``selection``, and what choosing it read."""
        rows = selection.counts.sum(-1, dtype=torch.float64)
        read = rows * self.geometry.row_bytes + selection.extra_bytes
        self.read.index_add_(0, slots, read)
        self.full.index_add_(0, slots, self._layer_bytes(positions, None))

    def add_round(self, slots: Tensor, visible: Tensor, dense: int, listed: Tensor | None = None) -> None:
        """A pass through all layers at once, or several.

        Args:
            visible: int ``[batch]``, tokens that the last row sees; of several passes their sum.
            dense: how many layers read all of them.
            listed: int ``[batch]``, entries of the lists that the others read, of all KV heads, layers and passes.
        """
        heads, nbytes = self.geometry.kv_heads, self.geometry.row_bytes
        seen = visible.double()
        read = seen * (dense * heads) if listed is None else torch.add(listed, seen, alpha=dense * heads)
        self.read.index_add_(0, slots, read, alpha=nbytes)
        self.full.index_add_(0, slots, seen, alpha=self.geometry.layers * heads * nbytes)

    def add_extra(self, slots: Tensor, nbytes: Tensor) -> None:
        """``nbytes`` ``[batch]`` of something else that was read."""
        self.read.index_add_(0, slots, nbytes.double())

    def add_keys(
        self, slots: Tensor, visible: Tensor, key_bytes: int | None = None, heads: Tensor | None = None
    ) -> None:
        """A pass over the keys alone of ``visible`` ``[batch]`` tokens.

        Args:
            key_bytes: of one key, where a copy in fewer bytes is read.
            heads: ``[batch]``, of how many KV heads, those of all layers counted; all if ``None``.
        """
        key_bytes = self.geometry.row_bytes // 2 if key_bytes is None else key_bytes
        keys = visible.double() * (self.geometry.layers * self.geometry.kv_heads if heads is None else heads)
        self.read.index_add_(0, slots, keys, alpha=key_bytes)

    def _layer_bytes(self, positions: Tensor, window: int | None) -> Tensor:
        visible = positions[:, -1].double() + 1
        if window is not None:
            visible = visible.clamp(max=window + positions.shape[1] - 1)
        return visible * (self.geometry.kv_heads * self.geometry.row_bytes)


class PrefillMeter:
    """Counts, on the device, how much of the causal attention over prompts was computed.

    Attributes:
        computed, full: float64 ``[slots]``, query-key products since :meth:`reset` of the slot, in layers that a
            prefill method may thin out.
    """

    def __init__(self, slots: int, device: torch.device | str) -> None:
        self.computed = torch.zeros(slots, dtype=torch.float64, device=device)
        self.full = torch.zeros(slots, dtype=torch.float64, device=device)

    def reset(self, slot: int) -> None:
        """Start a new request in ``slot``."""
        self.computed[slot] = 0
        self.full[slot] = 0

    def add(self, slot: int, start: int, rows: int, share: Tensor) -> None:
        """``rows`` rows behind ``start`` tokens, of whose causal products ``share`` was computed."""
        products = rows * start + rows * (rows + 1) / 2
        self.full[slot] += products
        self.computed[slot] += share.double() * products

    def fraction(self, slot: int) -> float:
        """Computed products over those of dense attention; 1 where nothing could be thinned out."""
        full = float(self.full[slot])
        return float(self.computed[slot]) / full if full else 1.0


def read_fractions(target: ReadMeter, draft: ReadMeter | None, slot: int) -> tuple[float, float]:
    """The :func:`fractions` of the request in ``slot``."""
    return fractions(
        float(target.read[slot]), float(target.full[slot]), float(draft.read[slot]) if draft else 0.0
    )


def fractions(read: float, full: float, draft: float) -> tuple[float, float]:
    """``kv_read_fraction`` and ``draft_read_fraction``: what target and draft read, over the target's full reads."""
    return (read / full, draft / full) if full else (0.0, 0.0)
