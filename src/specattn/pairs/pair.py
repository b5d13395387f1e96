"""The pair itself: two loaded models, one tokenizer, and what follows from the three."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pair:
    """A target model and the draft that proposes its tokens and shows it where to look.

    Attributes:
        name: a built-in name, or ``"TARGET + DRAFT"``.
        target: the model whose text is produced.
        draft: the small model; None for plain decoding with methods that need no draft.
        tokenizer: the target's tokenizer; the draft's agrees with it.
        mapping_file: the calibrated mapping that comes with a built-in pair, if there is one.
    """

    name: str
    target: PreTrainedModel = field(repr=False)
    draft: PreTrainedModel | None = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    mapping_file: Path | None = None

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The target, and the draft if there is one."""
        return (self.target,) if self.draft is None else (self.target, self.draft)

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and answer together that both models can attend to."""
        return min(model.config.max_position_embeddings for model in self.models)

    @property
    def vocab_size(self) -> int:
        """Token ids that both models know; from ``len(tokenizer)`` on they are padding of the embeddings."""
        return min(model.config.vocab_size for model in self.models)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer: by the target's generation config, and the tokenizer's own."""
        ids = self.target.generation_config.eos_token_id if self.target.generation_config else None
        several = ids if isinstance(ids, list | tuple) else [ids]
        return frozenset(i for i in (*several, self.tokenizer.eos_token_id) if i is not None)
