"""Named shapes: the models that they stand for, and small ones of their kind."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from specattn.benchmarks.shapes import SHAPES, Shape, check_shapes, random_mapping, random_model
from specattn.errors import UsageError
from specattn.fast.decoder import unsupported

BILLIONS = {
    "llama2": (6.74, 1.10),
    "llama31": (8.03, 1.24),
    "qwen25": (7.62, 0.494),
    "qwen3": (8.19, 0.596),
    "qwen-coder": (1.54, 0.494),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_bytes(name: str) -> None:
    for shape, billions in zip((SHAPES[name].target, SHAPES[name].draft), BILLIONS[name], strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.config())
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=5e-3)
        assert shape.nbytes == pytest.approx(2 * model.num_parameters(), rel=1e-3)
        assert unsupported(model) is None


@pytest.mark.parametrize("name", SHAPES)
def test_miniatures_keep_groups_and_heads(name: str) -> None:
    shape = SHAPES[name].target
    small = shape.miniature(2)
    assert (small.heads // small.kv_heads, small.head_dim) == (shape.heads // shape.kv_heads, shape.head_dim)
    model = random_model(small, torch.device("cpu"), torch.float32)
    assert Shape.of(model.config) == small
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    logits = model(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.1


def test_the_shape_of_a_model_that_exists() -> None:
    shape = Shape.of(tiny_model("qwen3").config)
    assert shape == Shape("qwen3", 3, 48, 96, 4, 2, 16, 96, tied=False)


def test_a_random_mapping_mixes() -> None:
    mapping = random_mapping(SHAPES["qwen-coder"], 64, torch.device("cpu"))
    assert mapping.global_heads.numel() == 63 and mapping.global_heads.diff().gt(0).all()
    assert mapping.global_kv.sum(-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_the_heads_of_a_random_mapping_are_whole_groups_of_all_depths(name: str) -> None:
    draft = SHAPES[name].draft
    heads = random_mapping(SHAPES[name], 64, torch.device("cpu")).global_heads
    group = draft.heads // draft.kv_heads
    numbers, counts = (heads // group).unique(return_counts=True)
    assert set(counts.tolist()) == {group} and abs(len(heads) - 64) < group
    gaps = (numbers // draft.kv_heads).diff()
    assert gaps.max() - gaps.min() <= 1, "evenly spread over the layers"


def test_a_random_mapping_has_a_group_at_least_and_all_at_most() -> None:
    few, many = (random_mapping(SHAPES["qwen3"], heads, torch.device("cpu")) for heads in (1, 10**6))
    assert few.global_heads.tolist() == [0, 1]
    assert many.global_heads.tolist() == list(range(28 * 16))


def test_unknown_names() -> None:
    check_shapes(list(SHAPES))
    with pytest.raises(UsageError, match=r"unknown shape 'llama3'.*llama31"):
        check_shapes(["llama2", "llama3"])
