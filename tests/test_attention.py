"""The seam: every supported architecture through our cache gives the logits of transformers' own attention."""

from __future__ import annotations

import pytest
import torch
from tiny import MODEL_TYPES, tiny_model

from specattn.attention import DenseAttend, ExportAttend, attached
from specattn.draft_attention import DraftAttention, ExportedHeads
from specattn.kernels.check import error_ratio
from specattn.runner import ModelRunner

PROMPT = torch.randint(0, 96, (1, 45), generator=torch.Generator().manual_seed(5))


def runner_of(model, **options):
    return ModelRunner(model, tokens=64, slots=2, page_size=4, **options)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_chunked_prefill_and_a_step_of_many_rows(model_type):
    model = tiny_model(model_type)
    with torch.inference_mode():
        expected = model(PROMPT).logits[0]
    with attached(model):
        runner = runner_of(model)
        slot = runner.cache.allocate(60)
        last = runner.prefill(slot, PROMPT[0, :33].tolist(), chunk=7)
        step = runner.step([slot], [33], 12, DenseAttend())
        rows = runner.forward(step, PROMPT[:, 33:], 12)
    assert error_ratio(last, expected[32]) < 1e-4
    assert error_ratio(rows[0], expected[33:]) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_ragged_batch_gives_what_each_request_gives_alone(model_type):
    model = tiny_model(model_type)
    with torch.inference_mode():
        expected = model(PROMPT).logits[0]
    with attached(model):
        runner = ModelRunner(model, tokens=200, slots=3, page_size=4)
        lengths = [9, 30, 17]
        slots = [runner.cache.allocate(length + 5) for length in lengths]
        for slot, length in zip(slots, lengths, strict=True):
            runner.prefill(slot, PROMPT[0, :length].tolist())
        tokens = torch.stack([PROMPT[0, length : length + 5] for length in lengths])
        rows = runner.forward(runner.step(slots, lengths, 5, DenseAttend()), tokens, 5)
    for row, length in zip(rows, lengths, strict=True):
        assert error_ratio(row, expected[length : length + 5]) < 1e-4


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox"])
def test_exported_scores_are_the_models_own_attention_weights(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model(PROMPT, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with attached(model):
        runner = runner_of(model)
        slot = runner.cache.allocate(60)
        runner.prefill(slot, PROMPT[0, :40].tolist())
        geometry = runner.geometry
        export = DraftAttention(
            ExportedHeads.of(geometry, None, model.device), batch=1, rows=3, length=50, device=model.device
        )
        runner.forward(runner.step([slot], [39], 4, ExportAttend(export, 0, 3)), PROMPT[:, 39:43], 1)
    heads = torch.cat([layer[0, :, 40:43] for layer in output.attentions]).transpose(0, 1)
    assert error_ratio(export.probabilities[0, :, :, :45], heads) < 1e-4
    assert (export.probabilities[..., 45:] == 0).all()
    by_layer = heads.unflatten(1, (geometry.layers, -1)).mean(2)
    assert error_ratio(export.by_layer()[0, ..., :45], by_layer) < 1e-4


def test_an_export_of_chosen_heads_keeps_just_those():
    model = tiny_model("llama")
    geometry = runner_of(model).geometry
    heads = torch.tensor([1, geometry.query_heads, 2 * geometry.query_heads + 1])
    exports = []
    for chosen in (None, heads):
        export = DraftAttention(
            ExportedHeads.of(geometry, chosen, model.device), batch=1, rows=2, length=20, device=model.device
        )
        with attached(model):
            runner = runner_of(model)
            slot = runner.cache.allocate(20)
            step = runner.step([slot], [0], 12, ExportAttend(export, 0, 2))
            runner.forward(step, PROMPT[:, :12], 1)
        exports.append(export.probabilities)
    assert exports[0].sum() > 0
    assert torch.equal(exports[0][:, :, heads], exports[1])


def test_attention_is_put_back_even_after_an_error():
    models = tiny_model("llama"), tiny_model("qwen2", seed=1)
    before = [model.config._attn_implementation for model in models]
    with pytest.raises(RuntimeError, match="on purpose"), attached(*models):
        assert {model.config._attn_implementation for model in models} == {"specattn"}
        raise RuntimeError("on purpose")
    assert [model.config._attn_implementation for model in models] == before
    with torch.inference_mode():
        assert torch.isfinite(models[0](PROMPT).logits).all()


def test_the_meter_counts_every_byte_that_dense_attention_reads():
    model = tiny_model("llama")
    with attached(model):
        runner = runner_of(model)
        slot = runner.cache.allocate(40)
        runner.prefill(slot, PROMPT[0, :20].tolist())
        assert runner.meter.full[slot] == 0
        runner.forward(runner.step([slot], [20], 3, DenseAttend()), PROMPT[:, 20:23], 1)
    assert runner.meter.read[slot] == runner.meter.full[slot] == 23 * runner.geometry.token_bytes


def test_a_sliding_window_layer_counts_its_window():
    model = tiny_model("gemma3_text")
    kinds = model.config.layer_types
    with attached(model):
        runner = runner_of(model)
        slot = runner.cache.allocate(60)
        runner.prefill(slot, PROMPT[0, :40].tolist())
        runner.forward(runner.step([slot], [40], 1, DenseAttend()), PROMPT[:, 40:41], 1)
    window, full = kinds.count("sliding_attention"), kinds.count("full_attention")
    assert window > 0 and full > 0
    a_layer = runner.geometry.token_bytes // runner.geometry.layers
    assert runner.meter.full[slot] == a_layer * (full * 41 + window * model.config.sliding_window)
