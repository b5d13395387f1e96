"""One model with its paged cache: prefill a request, run a step of a batch, roll back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specattn.accounting import PrefillMeter, ReadMeter
from specattn.attention import Attend, DenseAttend, PrefillAttend, Step, running
from specattn.cache import PagedKVCache
from specattn.geometry import KVGeometry
from specattn.prefill.base import PrefillMethod
from specattn.prefill.dense import Dense
from specattn.stores.base import StoreSpec

Progress = Callable[[int], None]
"""Called with the number of tokens that were just processed."""


class ModelRunner:
    """A model whose attention goes through a paged cache. Run it inside :func:`specattn.attention.attached`.

    Args:
        model: a transformers causal language model.
        tokens, slots, max_length, stores: size of the cache and what is kept beside it, see :class:`PagedKVCache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens: int,
        slots: int,
        max_length: int | None = None,
        stores: Sequence[StoreSpec] = (),
        page_size: int | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        self.geometry = KVGeometry.from_config(model.config, model.dtype)
        self.cache = PagedKVCache(
            self.geometry,
            tokens=tokens,
            slots=slots,
            max_length=max_length,
            device=model.device,
            stores=stores,
            page_size=page_size,
        )
        # One more for the spare slot.
        self.meter = ReadMeter(self.geometry, slots + 1, model.device)
        self.prefill_meter = PrefillMeter(slots, model.device)

    def step(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        rows: int | Sequence[int],
        attend: Attend,
        *,
        metered: bool = True,
    ) -> Step:
        """Describe a pass over ``rows`` new tokens of each of ``slots``, at text positions from ``starts`` on.

        Where requests have different numbers of ``rows``, all get as many as the longest, and repeat their last one.
        """
        slot_ids = torch.tensor(slots, device=self.device)
        first = torch.tensor(starts, device=self.device)
        counts = [rows] if isinstance(rows, int) else rows
        last = torch.tensor(counts, device=self.device)[:, None] - 1
        offsets = torch.arange(max(counts), device=self.device)
        text_positions = first[:, None] + torch.minimum(offsets, last)
        evicted = [self.cache.evicted(slot) for slot in slots]
        positions = text_positions - torch.tensor(evicted, device=self.device)[:, None]
        return Step(
            cache=self.cache,
            slots=slot_ids,
            host_slots=list(slots),
            starts=[start - gone for start, gone in zip(starts, evicted, strict=True)],
            positions=positions,
            text_positions=text_positions,
            pool_rows=self.cache.rows(slot_ids, positions),
            attend=attend,
            meter=self.meter if metered else None,
            rows=None if isinstance(rows, int) else list(rows),
        )

    @torch.inference_mode()
    def forward(self, step: Step, tokens: Tensor, keep: int) -> Tensor:
        """Run the model on ``tokens`` ``[batch, rows]``: logits of the last ``keep`` rows, ``[batch, keep, vocab]``.

        The caller sets the cache's lengths afterwards: how many of the new tokens count is its decision.
        """
        self.cache.note(step.slots, step.text_positions, tokens)
        with running(step):
            output = self.model(
                input_ids=tokens, position_ids=step.text_positions, use_cache=False, logits_to_keep=keep
            )
        return output.logits

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        chunk: int | None = None,
        method: PrefillMethod | None = None,
        attend: Attend | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Read ``tokens`` into ``slot``, behind what it holds, in chunks of ``chunk`` tokens.

        Attention is answered by ``attend`` if that is given, else by ``method``, else densely.

        Returns:
            The last token's logits ``[vocab]``.
        """
        chunk = chunk or default_chunk(self.device)
        attend = attend or self._prefill_attend(method)
        logits = None
        for first in range(0, len(tokens), chunk):
            piece = tokens[first : first + chunk]
            step = self.step([slot], [self.cache.position(slot)], len(piece), attend, metered=False)
            logits = self.forward(step, torch.tensor([list(piece)], device=self.device), keep=1)
            self.cache.set_length(slot, self.cache.length(slot) + len(piece))
            if progress:
                progress(len(piece))
        assert logits is not None, "prefill of no tokens"
        return logits[0, -1]

    def _prefill_attend(self, method: PrefillMethod | None) -> Attend:
        # What is dense stays where it was: scattered pages are read where they lie, nothing is counted.
        if method is None or isinstance(method, Dense):
            return DenseAttend()
        return PrefillAttend(method, self.prefill_meter)


def default_chunk(device: torch.device) -> int:
    """Tokens a prefill pass: enough to fill a GPU, few enough on a CPU to show progress and bound memory.

    Whole blocks, and several of them, for prefill methods that decide for 64 or 128 rows at once.
    """
    return 8192 if device.type == "cuda" else 512
