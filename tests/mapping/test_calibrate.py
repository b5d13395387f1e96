"""Calibration on pairs whose true map is known, and what it refuses before it runs a model."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tiny import tiny_model, tiny_pair, tiny_tokenizer
from transformers import PreTrainedModel

import specattn
from specattn.errors import CacheFullError, UsageError
from specattn.mapping import Mapping, statistics
from specattn.mapping.artifact import config_hash
from specattn.mapping.calibrate import calibrate
from specattn.pairs import Pair

TOKENS = torch.randint(3, 90, (400,), generator=torch.Generator().manual_seed(4)).tolist()
OPTIONS = {"tokens": 400, "rounds": 40, "gamma": 32}
"""Long rounds: the draft's rows, one less than the target's, then have almost the same mean."""

SMALL = {"tokens": 100, "rounds": 8}


def pair_of(target: PreTrainedModel, draft: PreTrainedModel) -> Pair:
    return Pair("known", target, draft, tiny_tokenizer())


@cache
def target(model_type: str = "llama") -> PreTrainedModel:
    return tiny_model(model_type)


@cache
def own_mapping(model_type: str) -> Mapping:
    """The target is its own draft."""
    return calibrate(pair_of(target(model_type), target(model_type)), [TOKENS], **OPTIONS)


ARCHITECTURES = ["llama", "gpt_neox", "gemma3_text"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_model_that_drafts_for_itself_maps_every_layer_to_itself(model_type):
    mapping = own_mapping(model_type)
    assert mapping.layer_map.tolist() == [0, 1, 2]
    assert torch.equal(mapping.similarity.argmax(1), torch.arange(3))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_model_that_drafts_for_itself_maps_every_head_to_itself(model_type):
    mapping = own_mapping(model_type)
    geometry = mapping.metadata.geometry
    heads, group = geometry.query_heads, geometry.query_heads // geometry.kv_heads
    own = torch.eye(geometry.draft_rows).unflatten(0, (geometry.target_layers, heads))
    assert float((mapping.heads_query - own).abs().max()) < 0.05
    # A KV head is the mean of its group.
    groups = own.unflatten(1, (-1, group)).mean(2)
    assert float((mapping.heads_kv - groups).abs().max()) < 0.05
    assert torch.allclose(mapping.heads_kv.sum(-1), torch.ones(geometry.target_layers, geometry.kv_heads))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_divergences_of_a_model_that_drafts_for_itself(model_type):
    metadata = own_mapping(model_type).metadata
    assert 0 <= metadata.kl_heads < 0.01
    # Averages over a layer's heads are all that the layer map has.
    assert metadata.kl_layer_map > 10 * metadata.kl_heads


def swap_groups(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """A copy that computes the same, but whose two KV heads of ``layer`` have changed places with their groups."""
    model = copy.deepcopy(model)
    attention, config = model.model.layers[layer].self_attn, model.config
    for projection, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        weight = getattr(attention, projection).weight
        weight.data = weight.data.unflatten(0, (2, heads // 2 * config.head_dim)).flip(0).flatten(0, 1)
    weight = attention.o_proj.weight
    weight.data = weight.data.unflatten(1, (2, 2 * config.head_dim)).flip(1).flatten(1, 2)
    return model


def test_heads_that_changed_places_are_found():
    draft = swap_groups(target(), layer=1)
    ids = torch.tensor([TOKENS[:50]])
    with torch.inference_mode():
        assert torch.allclose(draft(ids).logits, target()(ids).logits, atol=1e-4)
    mapping = calibrate(pair_of(target(), draft), [TOKENS], **OPTIONS)
    best = mapping.heads_query.flatten(0, 1).argmax(-1).tolist()
    assert best == [0, 1, 2, 3, 6, 7, 4, 5, 8, 9, 10, 11]
    assert mapping.metadata.kl_heads == pytest.approx(own_mapping("llama").metadata.kl_heads, rel=0.1)


def test_a_draft_of_the_targets_first_layers():
    draft = tiny_model("llama", layers=2)
    draft.load_state_dict({name: target().state_dict()[name] for name in draft.state_dict()})
    mapping = calibrate(pair_of(target(), draft), [TOKENS], **OPTIONS)
    assert mapping.layer_map.tolist()[:2] == [0, 1]
    assert mapping.heads_query[:2].flatten(0, 1).argmax(-1).tolist() == list(range(8))
    assert float(mapping.heads_query[:2].amax(-1).min()) > 0.9
    assert float(mapping.heads_query[2].amax(-1).max()) < 0.9, "the third layer has no head of its own there"


def test_the_global_set_is_made_of_whole_groups_that_the_mixtures_use():
    pair = pair_of(target(), target())  # six groups of two heads
    wide = calibrate(pair, [TOKENS], heads=99, **OPTIONS)
    assert wide.global_heads.tolist() == list(range(12)), "no more than there are"
    assert wide.metadata.kl_global == pytest.approx(wide.metadata.kl_heads, rel=1e-3)
    narrow = calibrate(pair, [TOKENS], heads=4, **OPTIONS)
    groups = narrow.global_heads.unflatten(0, (-1, 2))
    assert len(groups) == 2 and torch.equal(groups, groups[:, :1] // 2 * 2 + torch.arange(2))
    weights = torch.cat([narrow.heads_kv.flatten(0, 1), narrow.heads_query.flatten(0, 1)]).sum(0)
    heaviest = weights.unflatten(0, (-1, 2)).sum(-1).topk(3).indices  # what the first of two steps leaves
    assert set((groups[:, 0] // 2).tolist()) < set(heaviest.tolist())
    assert narrow.metadata.kl_global > 2 * narrow.metadata.kl_heads


def test_without_groups_every_head_is_chosen_for_itself():
    pair = pair_of(target("gpt_neox"), target("gpt_neox"))
    assert calibrate(pair, [TOKENS], heads=5, **SMALL).global_heads.numel() == 5


def tensors(mapping: Mapping) -> list[torch.Tensor]:
    return [
        mapping.layer_map,
        mapping.similarity,
        mapping.heads_kv,
        mapping.heads_query,
        mapping.global_heads,
        mapping.global_kv,
        mapping.global_query,
    ]


def test_a_seed_gives_one_mapping():
    pair = tiny_pair("llama")
    first, again, other = (calibrate(pair, [TOKENS], seed=seed, **SMALL) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert first.metadata == again.metadata
    assert not torch.equal(first.heads_kv, other.heads_kv)


@pytest.mark.parametrize("metric", ["kl", "js", "recall"])
def test_metadata(metric):
    pair = tiny_pair("qwen3")
    text = "".join(pair.tokenizer.convert_ids_to_tokens(TOKENS))
    mapping = calibrate(pair, [text, TOKENS[50:]], metric=metric, heads=2, **SMALL)
    metadata = mapping.metadata
    assert (metadata.target_hash, metadata.draft_hash) == tuple(config_hash(m.config) for m in pair.models)
    mapping.check(pair.target.config, pair.draft.config)
    assert metadata.target != metadata.draft
    assert (metadata.metric, metadata.tokens, metadata.rounds) == (metric, 200, 16)
    assert metadata.specattn == specattn.__version__
    assert mapping.global_heads.numel() == 2
    assert 0 < metadata.kl_heads < metadata.kl_global
    assert metadata.kl_heads < metadata.kl_layer_map
    assert len(metadata.text_hash) == 64
    changed = calibrate(pair, [text, TOKENS[51:]], metric=metric, **SMALL)
    assert changed.metadata.text_hash != metadata.text_hash
    same = calibrate(pair, [TOKENS, TOKENS[50:]], metric=metric, **SMALL)
    assert same.metadata.text_hash == metadata.text_hash, "the hash is of the tokens that were read"


def test_the_metric_decides_the_similarity_and_not_the_mixture():
    pair = tiny_pair("llama")
    kl, js = (calibrate(pair, [TOKENS], metric=metric, **SMALL) for metric in ("kl", "js"))
    assert not torch.allclose(kl.similarity, js.similarity)
    assert torch.equal(kl.heads_kv, js.heads_kv)


def test_progress_reports_the_tokens_of_both_models_and_the_passes_of_the_fits(monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 32)
    done = {"target": 0, "draft": 0, "mixture": 0}
    stages = []

    def progress(stage: str, count: int) -> None:
        done[stage] += count
        stages.append(stage)

    calibrate(tiny_pair("llama"), [TOKENS, TOKENS[7:]], progress=progress, **SMALL)
    assert (done["target"], done["draft"]) == (200, 200)
    assert done["mixture"] > 2
    assert stages[-done["mixture"] :] == ["mixture"] * done["mixture"]


def test_attention_is_put_back_even_after_an_error():
    pair = tiny_pair("llama")
    calibrate(pair, [TOKENS], **SMALL)
    assert {model.config._attn_implementation for model in pair.models} == {"sdpa"}

    def fail(stage: str, count: int) -> None:
        assert {model.config._attn_implementation for model in pair.models} == {"specattn"}
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        calibrate(pair, [TOKENS], progress=fail, **SMALL)
    assert {model.config._attn_implementation for model in pair.models} == {"sdpa"}


@pytest.fixture
def idle_pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair whose models must not run."""
    pair = tiny_pair("llama")
    for model in pair.models:
        monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("work was done"))
    return pair


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "metric='cosine' is unknown; choose one of kl, js, recall"),
        ({"tokens": 513}, "tokens=513 is beyond the models' context of 512"),
        ({"tokens": 401}, "text 1 has 400 tokens and 401 are to be read"),
        ({"tokens": 60, "texts": [TOKENS, TOKENS[:59]]}, "text 2 has 59 tokens and 60"),
        ({"tokens": 60, "texts": [TOKENS, "brief"]}, "text 2 has 5 tokens and 60"),
        ({"tokens": 100, "rounds": 128}, "100 tokens are too few to sample 128 rounds"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": -5}, "tokens=-5"),
        ({"rounds": 0}, "rounds=0"),
        ({"gamma": 0}, "gamma=0"),
        ({"gamma": 65}, "gamma=65"),
        ({"heads": 0}, "heads=0"),
        ({"texts": []}, "no text to calibrate on"),
    ],
)
def test_bad_input_is_refused_by_name_before_any_pass(options, message, idle_pair):
    texts = options.get("texts", [TOKENS])
    rest = {name: value for name, value in options.items() if name != "texts"}
    with pytest.raises(UsageError, match=message):
        calibrate(idle_pair, texts, **{"tokens": 100, "rounds": 8, **rest})


def test_a_pair_without_a_draft_is_refused(idle_pair):
    with pytest.raises(UsageError, match="the pair has no draft"):
        calibrate(Pair("plain", idle_pair.target, None, idle_pair.tokenizer), [TOKENS])


def test_statistics_that_do_not_fit_are_refused_before_any_pass(idle_pair, monkeypatch):
    monkeypatch.setattr("specattn.cache.available_bytes", lambda device: 20_000)
    with pytest.raises(CacheFullError, match=r"the statistics of 2 x 8 rounds of 100 tokens.*19\.5 KiB are"):
        calibrate(idle_pair, [TOKENS, TOKENS], **SMALL)
