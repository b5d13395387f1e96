"""A small mapping that is complete and consistent, and the configurations of its pair."""

import torch
from transformers import LlamaConfig

from specattn.mapping.artifact import Mapping, MappingMetadata, config_hash
from specattn.mapping.samples import Geometry

TARGET = LlamaConfig(
    hidden_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
)
DRAFT = LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)
GEOMETRY = Geometry(target_layers=5, query_heads=4, kv_heads=2, draft_layers=3, draft_heads=2)


def example_mapping(**changed: torch.Tensor) -> Mapping:
    generator = torch.Generator().manual_seed(0)

    def weights(heads: int, columns: int) -> torch.Tensor:
        return torch.randn(5, heads, columns, generator=generator).mul(3).softmax(-1)

    tensors = {
        "layer_map": torch.tensor([0, 0, 1, 2, 2]),
        "similarity": -torch.rand(5, 3, generator=generator),
        "heads_kv": weights(2, 6),
        "heads_query": weights(4, 6),
        "global_heads": torch.tensor([0, 2, 5]),
        "global_kv": weights(2, 3),
        "global_query": weights(4, 3),
        "signal_weight": torch.tensor([0.0, 0.5, 0.4, 0.9, 0.1]),
        "signal_half_life": torch.tensor([8.0, 64.0, 512.0, 65536.0, 8.0]),
    }
    metadata = MappingMetadata(
        target="org/target-5L",
        target_hash=config_hash(TARGET),
        draft="org/draft-3L",
        draft_hash=config_hash(DRAFT),
        geometry=GEOMETRY,
        text_hash="ab" * 32,
        metric="kl",
        tokens=4096,
        rounds=128,
        specattn="0.1.0",
        kl_layer_map=0.5,
        kl_heads=0.23,
        kl_global=0.24,
    )
    return Mapping(**{**tensors, **changed}, metadata=metadata)
