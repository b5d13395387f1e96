"""What counts towards a model's identity and what does not."""

import pytest
from transformers import Gemma3Config, Gemma3TextConfig, LlamaConfig, Qwen2Config

from specattn.mapping.identity import config_hash, describe


def small(**options: object) -> LlamaConfig:
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    return LlamaConfig(**{**fields, **options})


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 128},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},
        {"num_key_value_heads": 2},
        {"head_dim": 32},
        {"vocab_size": 101},
        {"intermediate_size": 99},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_attention_geometry_counts(changed: dict[str, object]) -> None:
    assert config_hash(small(**changed)) != config_hash(small())


def test_the_architecture_counts() -> None:
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    assert config_hash(Qwen2Config(**fields, num_key_value_heads=4)) != config_hash(LlamaConfig(**fields))


def test_names_precision_and_versions_do_not_count() -> None:
    config = small(dtype="bfloat16", max_position_embeddings=123, use_cache=False)
    config._name_or_path = "elsewhere/model"
    config.transformers_version = "5.0.0"
    assert config_hash(config) == config_hash(small())


def test_defaults_equal_the_same_values_spelled_out() -> None:
    assert config_hash(small(num_key_value_heads=4, head_dim=16)) == config_hash(small())


def test_where_the_rope_base_is_kept_does_not_count() -> None:
    class Older:
        """A configuration that keeps ``rope_theta`` beside ``rope_scaling``."""

        model_type, intermediate_size, vocab_size = "llama", small().intermediate_size, 100
        hidden_size, num_hidden_layers, num_attention_heads = 64, 2, 4
        rope_theta, rope_scaling = 10000, {"type": "linear", "factor": 2}

        def get_text_config(self) -> "Older":
            return self

    newer = small(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    assert config_hash(Older()) == config_hash(newer)


def test_an_unset_rope_option_does_not_count() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    unset = small(rope_parameters={**rope, "attention_factor": None})
    assert config_hash(unset) == config_hash(small(rope_parameters=rope))


def test_a_switched_off_sliding_window_does_not_count() -> None:
    off = Qwen2Config(use_sliding_window=False, sliding_window=4096)
    assert config_hash(off) == config_hash(Qwen2Config(use_sliding_window=False, sliding_window=128))
    on = Qwen2Config(use_sliding_window=True, sliding_window=128)
    assert config_hash(on) != config_hash(off)


def test_a_multimodal_configuration_is_its_text_model() -> None:
    config = Gemma3Config()
    assert config_hash(config) == config_hash(Gemma3TextConfig())
    local = config.get_text_config().rope_parameters["sliding_attention"]
    local["rope_theta"] = 1.0
    assert config_hash(config) != config_hash(Gemma3TextConfig())


def test_describe_prefers_the_name() -> None:
    config = small()
    assert describe(config) == "a llama model of 2 layers"
    config._name_or_path = "org/model"
    assert describe(config) == "org/model"
