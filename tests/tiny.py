"""Tiny random models of every supported architecture, pairs of them, a tokenizer and a mapping, in memory."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from specattn.mapping import Mapping, MappingMetadata
from specattn.mapping.artifact import config_hash
from specattn.mapping.samples import Geometry
from specattn.pairs import SUPPORTED, Pair, make_pair

MODEL_TYPES = SUPPORTED
VOCAB = 96
PAD, EOS, UNK = 0, 1, 2
CHARACTERS = "\n" + "".join(character for character in map(chr, range(32, 127)) if character not in "^`~")


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = VOCAB,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
) -> PreTrainedModel:
    """A model with weights drawn from ``seed``, large enough that neither attention nor logits are flat.

    GPT-NeoX has as many KV heads as query heads and a hidden size of ``heads * head_dim``; Gemma 3 alternates
    sliding (window 16 unless told) and full layers; the mixtures have 4 experts, 2 of them active.
    """
    if model_type == "gpt_neox":
        hidden, kv_heads = heads * head_dim, heads
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="sdpa",
        **_particulars(model_type, layers, head_dim, sliding_window),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if (
                parameter.dim() == 1
            ):  # norms and biases, which start at 1 and 0 and would hide what mixes them up
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).requires_grad_(False).eval()


def _particulars(model_type: str, layers: int, head_dim: int, sliding_window: int | None) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"] * layers
    if model_type == "gemma3_text":
        window = sliding_window or 16
        return {"layer_types": kinds[:layers], "sliding_window": window, "query_pre_attn_scalar": head_dim}
    if model_type == "qwen2" and sliding_window:
        return {"layer_types": kinds[:layers], "sliding_window": sliding_window, "use_sliding_window": True}
    if model_type == "mistral":
        return {"sliding_window": sliding_window}
    if sliding_window is not None:
        raise ValueError(f"no sliding window in a tiny {model_type}")
    if model_type == "mixtral":
        return {"num_local_experts": 4, "num_experts_per_tok": 2}
    if model_type == "qwen3_moe":
        return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {}


def tiny_pair(model_type: str = "llama", *, seed: int = 0, layers: int = 3, **options: Any) -> Pair:
    """A target of ``layers`` layers and an unrelated draft with fewer layers, heads and dimensions."""
    draft = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1}
    target_model = tiny_model(model_type, seed=seed, layers=layers, **options)
    draft_model = tiny_model(model_type, seed=seed + 1, **options | draft)
    return make_pair(target_model, draft_model, tiny_tokenizer(), name=f"tiny-{model_type}")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of 93 characters, after ``<pad>``, ``<eos>`` and ``<unk>``."""
    tokens = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_mapping(pair: Pair, *, heads: int = 3, seed: int = 0) -> Mapping:
    """A mapping for this pair with random mixtures, the global one over ``heads`` draft heads."""
    assert pair.draft is not None
    target, draft = pair.target.config, pair.draft.config
    geometry = Geometry(
        target.num_hidden_layers,
        target.num_attention_heads,
        getattr(target, "num_key_value_heads", None) or target.num_attention_heads,
        draft.num_hidden_layers,
        draft.num_attention_heads,
    )
    return random_mapping(
        geometry,
        heads=heads,
        seed=seed,
        target=f"{pair.name} target",
        target_hash=config_hash(target),
        draft=f"{pair.name} draft",
        draft_hash=config_hash(draft),
    )


def random_mapping(geometry: Geometry, *, heads: int = 3, seed: int = 0, **names: str) -> Mapping:
    """A mapping between two models of these shapes with random mixtures; ``names`` says which models they are."""
    generator = torch.Generator().manual_seed(seed)

    def mixture(rows: int, columns: int) -> Tensor:
        return torch.rand(geometry.target_layers, rows, columns, generator=generator).softmax(-1)

    known = {"target": "target", "target_hash": "", "draft": "draft", "draft_hash": "", **names}
    return Mapping(
        layer_map=torch.arange(geometry.target_layers) * geometry.draft_layers // geometry.target_layers,
        similarity=torch.rand(geometry.target_layers, geometry.draft_layers, generator=generator),
        heads_kv=mixture(geometry.kv_heads, geometry.draft_rows),
        heads_query=mixture(geometry.query_heads, geometry.draft_rows),
        global_heads=torch.randperm(geometry.draft_rows, generator=generator)[:heads].sort().values,
        global_kv=mixture(geometry.kv_heads, heads),
        global_query=mixture(geometry.query_heads, heads),
        signal_weight=torch.rand(geometry.target_layers, generator=generator),
        signal_half_life=1 + 99 * torch.rand(geometry.target_layers, generator=generator),
        metadata=MappingMetadata(
            **known,
            geometry=geometry,
            text_hash="0" * 64,
            metric="kl",
            tokens=0,
            rounds=0,
            specattn="0.0.0",
            kl_layer_map=0.0,
            kl_heads=0.0,
            kl_global=0.0,
        ),
    )
