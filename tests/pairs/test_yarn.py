"""Contexts beyond those that a model was trained on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import MODEL_TYPES, tiny_mapping, tiny_model, tiny_pair

from specattn import load_pair
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.mapping.identity import config_hash
from specattn.pairs import find_pair
from specattn.pairs.yarn import stretched


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    pair = tiny_pair("llama", max_positions=64)
    for role in ("target", "draft"):
        getattr(pair, role).save_pretrained(folder / role)
        pair.tokenizer.save_pretrained(folder / role)
    return folder / "target", folder / "draft"


def yarn_frequencies(dim: int, base: float, factor: float, trained: int) -> list[float]:
    """Equations 17 to 23 of the paper, with its alpha = 1 and beta = 32."""

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), dim - 1)
    frequencies = []
    for pair in range(dim // 2):
        frequency = base ** (-2 * pair / dim)
        stretched_share = min(max((pair - low) / max(high - low, 0.001), 0), 1)
        frequencies.append(frequency * (1 - stretched_share) + frequency / factor * stretched_share)
    return frequencies


def test_both_models_are_stretched(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    assert find_pair(target=target, draft=draft).context_limit == 64
    found = find_pair(target=target, draft=draft, yarn=4)
    assert found.context_limit == 256 and found.name.endswith("(YaRN 4)")
    pair = load_pair(target=target, draft=draft, yarn=4, dtype="float32", device="cpu")
    assert pair.context_limit == 256
    for model in pair.models:
        rope = model.get_decoder().rotary_emb
        base = model.config.rope_parameters["rope_theta"]
        assert rope.inv_freq.tolist() == pytest.approx(yarn_frequencies(16, base, 4, 64), rel=1e-5)
        assert rope.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_it_generates_beyond_the_trained_context(folders: tuple[Path, Path]) -> None:
    pair = load_pair(target=folders[0], draft=folders[1], yarn=4, dtype="float32", device="cpu")
    prompt = torch.randint(3, 90, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"max_new_tokens": 8, "ignore_eos": True}
    expected = pair.target.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )
    (result,) = generate(pair, [prompt], method="dense", **options)
    assert result.tokens == expected[0, 120:].tolist()


def test_a_mapping_serves_the_stretched_pair(folders: tuple[Path, Path]) -> None:
    pair = load_pair(target=folders[0], draft=folders[1], yarn=4, dtype="float32", device="cpu")
    mapping = tiny_mapping(tiny_pair("llama", max_positions=64))
    (result,) = generate(pair, [[5] * 100], method="specattn", mapping=mapping, max_new_tokens=4)
    assert result.error is None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_any_model_keeps_its_identity(model_type: str) -> None:
    config = tiny_model(model_type, layers=2).config
    new = stretched(config, 2.5, "it")
    assert new.max_position_embeddings == 1280 and config.max_position_embeddings == 512
    assert config_hash(new) == config_hash(config)
    kinds = [rope for rope in new.rope_parameters.values() if isinstance(rope, dict)] or [new.rope_parameters]
    assert [rope["rope_type"] for rope in kinds].count("yarn") == 1
    if model_type == "gemma3_text":
        assert new.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]


@pytest.mark.parametrize("factor", [1, 0, -2, float("nan")])
def test_a_factor_is_above_1(factor: float) -> None:
    with pytest.raises(UsageError, match="must be above 1"):
        stretched(tiny_model("llama").config, factor, "it")


def test_what_is_scaled_already_is_refused() -> None:
    config = stretched(tiny_model("llama").config, 2, "it")
    with pytest.raises(UsageError, match="it has yarn rotary embeddings already"):
        stretched(config, 2, "it")
