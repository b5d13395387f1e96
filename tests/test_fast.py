"""The fast path against the path that it speeds up: the same tokens, the same account.

On the CPU and in float32, where both round alike; ``test_cuda.py`` has what a GPU is to show.
"""

from __future__ import annotations

import copy

import fake_flashinfer
import pytest
import torch
from tiny import tiny_mapping, tiny_pair

from specattn.attention import attached
from specattn.errors import UsageError
from specattn.fast.operations import Operations, operations_for, references, with_flashinfer
from specattn.fast.speculator import FastSpeculator, unsupported
from specattn.pairs import Pair
from specattn.runner import ModelRunner
from specattn.sampling import SamplingParams, SamplingState
from specattn.selection.registry import parse_method
from specattn.speculation import Batch, Speculator

PROMPTS = [list(range(3, 40)), list(range(90, 30, -1)), list(range(5, 25)), list(range(10, 80, 3))]
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.7, seed=5)
CUT = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=9)


class Rounds:
    """Requests that are decoded round by round."""

    def __init__(self, pair: Pair, method: str, *, fast: bool, operations: Operations | None = None) -> None:
        self.pair = pair
        size = {"tokens": 400, "slots": 4, "max_length": 128}
        target = ModelRunner(pair.target, **size)
        draft = None if pair.draft is None else ModelRunner(pair.draft, **size)
        mapping = tiny_mapping(pair).to(pair.device) if method.startswith("specattn") else None
        slow = Speculator(target, draft, parse_method(method), mapping, pair.vocab_size)
        assert not fast or unsupported(slow.method, pair.models) is None
        self.speculator = FastSpeculator(slow, operations) if fast else slow

    def run(
        self, params: list[SamplingParams], rounds: int, gamma: int
    ) -> tuple[list[list[int]], list[float]]:
        """Tokens of each prompt, and the bytes that target and draft read for it."""
        runners = [runner for runner in (self.speculator.target, self.speculator.draft) if runner is not None]
        slots = list(range(len(params)))
        for runner in runners:
            assert [runner.cache.allocate(100) for _ in params] == slots
        tokens = [list(prompt) for prompt in PROMPTS[: len(params)]]
        device = self.pair.device
        sampling = SamplingState.of(params, device)
        with attached(*self.pair.models), torch.inference_mode():
            for slot, text in zip(slots, tokens, strict=True):
                for runner in runners:
                    runner.prefill(slot, text[:-1])
                self.speculator.commit(slot, len(text) - 1)
            for number in range(rounds):
                lengths = [len(text) - 1 for text in tokens]
                recent = torch.tensor([text[-2:] for text in tokens], device=device)
                counter = torch.full((len(tokens),), number + 1, device=device)
                outcome = self.speculator.round(Batch(slots, lengths, recent, counter, sampling), gamma)
                found = zip(slots, tokens, outcome.tokens.tolist(), outcome.counts.tolist(), strict=True)
                for slot, text, new, count in found:
                    text += new[:count]
                    self.speculator.commit(slot, len(text) - 1)
        return tokens, [float(runner.meter.read[slot]) for runner in runners for slot in slots]


def make(model_type: str, **options) -> Pair:
    """A target and a draft that is a little different from it, so that some tokens are accepted and some are not."""
    pair = tiny_pair(model_type, head_dim=32, **options)
    draft = copy.deepcopy(pair.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return Pair(pair.name, pair.target, draft, pair.tokenizer)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "method",
    [
        "dense",
        "specattn:p=0.6:map=global",
        "specattn-paper:p=0.7:aggregate=mean",
        "specattn:p=0.4:tail=0.1:seed=3",
        "specattn:p=0.6:every_row=true",
        "specattn:p=0.4:echo=3",
        "specattn:p=0.4:tail=0.1:power=0.8:every_row=true",
        "specattn:rate=0.15:power=0.8:seed=2:every_row=true",
        "specattn:p=0.4:dense_below=44",  # of the three requests one begins above it, and one comes to be
        "specattn:p=0.4:dense_below=44:tail=0.1:map=global",
    ],
)
def test_greedy_rounds(model_type, method):
    pair = make(model_type, layers=4)
    results = [Rounds(pair, method, fast=fast).run([GREEDY] * 3, 8, 4) for fast in (False, True)]
    assert results[1][0] == results[0][0]
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-6)
    produced = sum(map(len, results[1][0])) - sum(map(len, PROMPTS[:3]))
    assert 3 * 8 < produced < 3 * 8 * 5, "some tokens were accepted, some were not"


@pytest.mark.parametrize("params", [[SAMPLED, GREEDY, SAMPLED], [CUT, SAMPLED], [CUT]])
@pytest.mark.parametrize(
    "method", ["dense", "specattn:p=0.6", "specattn:p=0.6:every_row=true", "specattn:rate=0.2:map=global"]
)
def test_sampled_rounds(params, method):
    pair = make("qwen2", layers=4)
    slow, fast = (Rounds(pair, method, fast=fast).run(params, 8, 3) for fast in (False, True))
    assert fast[0] == slow[0]


@pytest.mark.parametrize("method", ["dense", "specattn:p=0.6"])
def test_rounds_with_flashinfer(method, monkeypatch):
    plans = fake_flashinfer.install(monkeypatch).plans
    monkeypatch.setattr("specattn.kernels.flashinfer_attention.WORKSPACE_BYTES", 16)
    pair = make("qwen2", layers=4)
    operations = with_flashinfer(references(), pair.device)
    assert references().captured and not operations.captured
    found = Rounds(pair, method, fast=True, operations=operations).run([GREEDY] * 3, 4, 3)
    assert found == Rounds(pair, method, fast=True).run([GREEDY] * 3, 4, 3)
    dense = 1 if method == "dense" else 1 + 2  # one plan for all dense layers, one for each sparse layer
    assert plans == ["Prefill"] * 4 * dense


def test_unknown_attention_and_flashinfer_without_a_gpu_are_refused():
    with pytest.raises(UsageError, match="attention='cudnn' is unknown; choose one of triton, flashinfer"):
        operations_for(torch.device("cpu"), "cudnn")
    with pytest.raises(UsageError, match="needs a CUDA GPU, not cpu"):
        operations_for(torch.device("cpu"), "flashinfer")


def test_plain_decoding():
    pair = make("llama")
    plain = Pair(pair.name, pair.target, None, pair.tokenizer)
    slow, fast = (Rounds(plain, "dense", fast=fast).run([GREEDY, SAMPLED], 8, 0) for fast in (False, True))
    assert fast == slow


def test_batches_and_gammas_change_between_rounds():
    pair = make("qwen3", layers=4)
    fast, slow = (Rounds(pair, "specattn:p=0.6:every_row=true", fast=fast) for fast in (True, False))
    for params, gamma in [([GREEDY] * 3, 2), ([GREEDY], 4), ([SAMPLED] * 2, 2), ([GREEDY] * 3, 2)]:
        assert fast.run(params, 3, gamma)[0] == slow.run(params, 3, gamma)[0]
        for rounds in (fast, slow):
            for runner in (rounds.speculator.target, rounds.speculator.draft):
                for slot in range(len(params)):
                    runner.cache.free(slot)


@pytest.mark.parametrize(
    "model_type,method,reason",
    [
        ("gemma3_text", "dense", "not gemma3_text"),
        ("gpt_neox", "dense", "not gpt_neox"),
        ("llama", "oracle:p=0.9", "has no fast path yet"),
        ("llama", "specattn:aggregate=union", "aggregate=mean only"),
        ("llama", "specattn:rate=0.2:aggregate=rms", "aggregate=mean only"),
        ("llama", "specattn:eps=0.1", "eps=0 only"),
        ("llama", "specattn:rate=0.2:dense_below=100", "dense_below=0 only"),
        ("llama", "specattn:centroids=64", "centroids=0 only"),
        ("llama", "specattn:signals=both", "signals=draft only"),
    ],
)
def test_what_has_no_fast_path_says_why(model_type, method, reason):
    pair = make(model_type)
    target, draft = (ModelRunner(model, tokens=64, slots=1) for model in pair.models)
    speculator = Speculator(target, draft, parse_method(method), tiny_mapping(pair), pair.vocab_size)
    assert reason in unsupported(speculator.method, pair.models)


def test_sliding_windows_and_long_rotary_embeddings_are_left_to_transformers():
    from specattn.fast import decoder

    assert "sliding-window" in decoder.unsupported(make("mistral", sliding_window=16).target)
    model = make("llama").target
    model.model.rotary_emb.rope_type = "dynamic"
    assert "dynamic" in decoder.unsupported(model)


def test_merged_weights_are_shared_with_the_modules():
    from specattn.fast.decoder import FastDecoder

    model = make("qwen2").target
    fast = FastDecoder(model, 32)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert (
        attention.k_proj.weight.untyped_storage().data_ptr()
        == fast.layers[1].qkv.untyped_storage().data_ptr()
    )
    assert (
        mlp.up_proj.weight.untyped_storage().data_ptr() == fast.layers[1].gate_up.untyped_storage().data_ptr()
    )
    assert torch.equal(fast.layers[1].gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
