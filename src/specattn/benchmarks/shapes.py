"""Pairs of models by their shapes, with random weights: what a benchmark of speed needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specattn.errors import UsageError
from specattn.mapping.artifact import Mapping, MappingMetadata
from specattn.mapping.identity import config_hash
from specattn.mapping.samples import Geometry


@dataclass(frozen=True)
class Shape:
    """One model: what decides how fast it decodes."""

    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    def config(self) -> Any:
        """As a transformers configuration."""
        return AutoConfig.for_model(
            self.kind,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
        )

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a model that exists."""
        return cls(
            config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.vocab_size,
            config.tie_word_embeddings,
        )

    def miniature(self, layers: int) -> Shape:
        """A small model whose attention has this one's groups and head size."""
        group = self.heads // self.kv_heads
        return replace(self, layers=layers, hidden=256, inner=512, heads=2 * group, kv_heads=2, vocab=512)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in bfloat16, all but norms and biases."""
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim
        layer = self.hidden * (heads + 3 * self.inner)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return 2 * (self.layers * layer + embeddings)


@dataclass(frozen=True)
class PairShape:
    """A target and its draft."""

    target: Shape
    draft: Shape


SHAPES = {
    "llama2": PairShape(  # Llama-2-7B and TinyLlama-1.1B, the paper's pair
        Shape("llama", 32, 4096, 11008, 32, 32, 128, 32000), Shape("llama", 22, 2048, 5632, 32, 4, 64, 32000)
    ),
    "llama31": PairShape(  # Llama-3.1-8B and Llama-3.2-1B
        Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    ),
    "qwen25": PairShape(  # Qwen2.5-7B and 0.5B
        Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064),
        Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    ),
    "qwen3": PairShape(  # Qwen3-8B and 0.6B
        Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936),
        Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, tied=True),
    ),
    "qwen-coder": PairShape(  # Qwen2.5-Coder-1.5B and 0.5B
        Shape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
        Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    ),
}


def check_shapes(names: Sequence[str]) -> None:
    """Refuse a name that is none of :data:`SHAPES`.

    Raises:
        UsageError: naming it.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise UsageError(f"unknown shape {unknown[0]!r}: choose from {', '.join(SHAPES)}")


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model of this shape whose weights are drawn at random, as large as trained ones are."""
    config = shape.config()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
        elif parameter.dim() == 1:  # of a norm
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    # What no checkpoint holds was left empty too.
    rotary = model.get_decoder().rotary_emb
    model.get_decoder().rotary_emb = type(rotary)(config).to(device)
    return model.requires_grad_(False).eval()


def random_mapping(pair: PairShape, heads: int, device: torch.device) -> Mapping:
    """A mapping over about ``heads`` draft heads; each of the target's KV heads mixes all of them.

    They are whole groups of the draft's KV heads, spread over its layers, as those of a calibrated mapping are.
    """
    target, draft = pair.target, pair.draft
    geometry = Geometry(target.layers, target.heads, target.kv_heads, draft.layers, draft.heads)
    generator = torch.Generator().manual_seed(0)

    def mixture(rows: int, columns: int) -> torch.Tensor:
        return (3 * torch.randn(target.layers, rows, columns, generator=generator)).softmax(-1)

    size, groups = draft.heads // draft.kv_heads, draft.layers * draft.kv_heads
    chosen = min(max(round(heads / size), 1), groups)
    firsts = torch.arange(chosen) * groups // chosen * size
    every = (firsts[:, None] + torch.arange(size)).flatten()
    count = len(every)
    return Mapping(
        layer_map=torch.arange(target.layers) * draft.layers // target.layers,
        similarity=torch.zeros(target.layers, draft.layers),
        heads_kv=mixture(target.kv_heads, geometry.draft_rows),
        heads_query=mixture(target.heads, geometry.draft_rows),
        global_heads=every,
        global_kv=mixture(target.kv_heads, count),
        global_query=mixture(target.heads, count),
        metadata=MappingMetadata(
            target="random target",
            target_hash=config_hash(target.config()),
            draft="random draft",
            draft_hash=config_hash(draft.config()),
            geometry=geometry,
            text_hash="0" * 64,
            metric="none",
            tokens=0,
            rounds=0,
            specattn="random",
            kl_layer_map=0.0,
            kl_heads=0.0,
            kl_global=0.0,
        ),
    ).to(device)
