"""The PyTorch path on a GPU gives what it gives on the CPU, and the fast path what that gives. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from test_fast import CUT, GREEDY, SAMPLED, Rounds, make
from test_fast_engine import figures, serve
from tiny import tiny_mapping, tiny_pair, tiny_tokenizer

from specattn.benchmarks.decode_gate import check_rounds
from specattn.benchmarks.report import Report
from specattn.benchmarks.shapes import SHAPES
from specattn.benchmarks.timing import GraphTimer
from specattn.dropin import sparse_attention
from specattn.engine import Engine
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.generation import generate
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.kernels.nucleus import nucleus
from specattn.kernels.sparse_attention import sparse_attention as sparse_kernel
from specattn.mapping.calibrate import calibrate
from specattn.pairs import Pair, make_pair
from specattn.prefill.thresholds import Thresholds
from specattn.prefill.tune import tune_sparge
from specattn.prefill.two_stage import two_stage_attention
from specattn.request import Request
from specattn.sampling import SamplingParams
from specattn.selection.base import Selection
from specattn.selection.registry import parse_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROMPTS = [list(range(3, 40)), list(range(90, 30, -1)), list(range(5, 25))]


def cuda_pair(model_type: str = "qwen2", **options: int) -> Pair:
    pair = tiny_pair(model_type, layers=4, **options)
    return make_pair(pair.target.cuda(), pair.draft.cuda(), pair.tokenizer, name=pair.name)


def test_nucleus_selects_the_same_positions():
    weights = torch.rand(3, 4, 1000, generator=torch.Generator().manual_seed(0)) ** 8
    lengths = torch.tensor([1000, 700, 3])
    expected = nucleus(weights, 0.9, lengths, sink=2, recent=5)
    assert torch.equal(nucleus(weights.cuda(), 0.9, lengths.cuda(), sink=2, recent=5).cpu(), expected)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_kernels(dtype, bound):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(5, 6, 64, generator=generator)
    key, value = torch.randn(2, 777, 2, 64, generator=generator)
    expected = dense_attention(query.double(), [(key.double(), value.double())], 772, 0, 0.125)
    moved = query.to("cuda", dtype), [(key.to("cuda", dtype), value.to("cuda", dtype))]
    assert error_ratio(dense_attention(*moved, 772, 0, 0.125).cpu(), expected) < bound
    full = Selection.from_mask(torch.ones(1, 2, 777, dtype=torch.bool, device="cuda"))
    keys, values = (tensor.to("cuda", dtype).transpose(0, 1)[None] for tensor in (key, value))
    positions = torch.arange(772, 777, device="cuda")[None]
    out = sparse_kernel(moved[0][None], keys, values, full, positions, 0.125)
    assert error_ratio(out[0].cpu(), expected) < bound


@pytest.mark.parametrize("start", [0, 1, 300])
def test_chunks_of_a_prompt(start):
    rows, length = 129, start + 129
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(rows, 6, 64, generator=generator)
    key, value = torch.randn(2, length, 2, 64, generator=generator)
    expected = dense_attention(query.double(), [(key.double(), value.double())], start, 0, 0.125)
    moved = (part.to("cuda", torch.bfloat16) for part in (query, key, value))
    query, key, value = moved
    assert error_ratio(dense_attention(query, [(key, value)], start, 0, 0.125).cpu(), expected) < 1e-2


@pytest.mark.parametrize("method", ["dense", "specattn:p=1", "specattn-paper:p=1"])
def test_greedy_tokens_equal_transformers(method):
    pair = cuda_pair()
    mapping = tiny_mapping(pair)
    results = generate(
        pair, PROMPTS, method=method, mapping=mapping, max_new_tokens=20, ignore_eos=True, max_batch=3
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        output = pair.target.generate(
            torch.tensor([prompt], device="cuda"),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.tokens == output[0, len(prompt) :].tolist()


def test_an_evaluation_gives_the_cpus_figures():
    tokens = [3 + (7 * i * i + i) % 90 for i in range(201)]
    methods = [parse_method(name) for name in ("specattn:p=0.7", "specattn:p=0.7:map=global", "oracle:p=0.7")]
    figures = []
    for pair in (tiny_pair("qwen2", layers=4), cuda_pair()):
        results = evaluate(
            pair, [Document("a", tokens)], methods, context=200, rows=20, mapping=tiny_mapping(pair)
        )
        figures.append([(r.kl, r.kv_read_fraction, r.draft_read_fraction) for r in results])
    for cpu, cuda in zip(*figures, strict=True):
        assert cuda == pytest.approx(cpu, rel=1e-2, abs=1e-6)


def test_methods_with_kernels_of_their_own_give_the_cpus_figures():
    tokens = [3 + (7 * i * i + i) % 90 for i in range(201)]
    names = (
        "quest:budget=0.3",
        "twilight:base=full:p=0.7",
        "twilight:base=full:p=0.7:bits=8",
        "twilight:p=0.6",
    )
    figures = []
    for pair in (tiny_pair("qwen2", layers=4, head_dim=32), cuda_pair(head_dim=32)):
        documents, methods = [Document("a", tokens)], [parse_method(name) for name in names]
        results = evaluate(pair, documents, methods, context=200, rows=20)
        figures.append([(r.kl, r.kv_read_fraction) for r in results])
    for cpu, cuda in zip(*figures, strict=True):
        assert cuda == pytest.approx(cpu, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("method", ["streaming:budget=0.3", "specattn:p=0.6"])
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(method):
    pair = cuda_pair()
    options = {"method": method, "mapping": tiny_mapping(pair), "max_new_tokens": 16, "ignore_eos": True}
    together = generate(pair, PROMPTS, **options)
    assert [result.tokens for result in together] == [
        generate(pair, [prompt], **options)[0].tokens for prompt in PROMPTS
    ]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_the_drop_in_gives_the_tokens_of_the_engines_plain_decoding(cache):
    """With a static cache transformers compiles the model around the attention."""
    model, method = cuda_pair().target, "oracle:p=0.6:dense_layers=1"
    plain = Pair("plain", model, None, tiny_tokenizer())
    (result,) = generate(plain, PROMPTS[:1], method=method, max_new_tokens=12, ignore_eos=True)
    ids = torch.tensor(PROMPTS[:1], device="cuda")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **cache}
    with sparse_attention(model, method):
        output = model.generate(ids, **options)
    assert output[0, ids.shape[1] :].tolist() == result.tokens


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("start", [0, None])
def test_both_stages_of_a_sparse_prefill(int8, start, dtype, bound):
    generator = torch.Generator().manual_seed(0)
    # Runs of like tokens, so that blocks are compressed.
    query, key = (
        torch.randn(1, heads, 5, 64, generator=generator).repeat_interleave(128, 2)[:, :, :600]
        + 0.3 * torch.randn(1, heads, 600, 64, generator=generator)
        for heads in (6, 2)
    )
    value = torch.randn(1, 2, 600, 64, generator=generator)
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    options = {"start": start, "scaling": 0.2, "int8": int8}
    cpu = two_stage_attention(query, key, value, Thresholds.uniform(0.4, 0.8, 3.0, 6, "cpu"), **options)
    moved = (tensor.cuda() for tensor in (query, key, value))
    cuda = two_stage_attention(*moved, Thresholds.uniform(0.4, 0.8, 3.0, 6, "cuda"), **options)
    assert error_ratio(cuda.out.cpu(), cpu.out) < max(bound, 1e-3 if int8 else 0)
    assert torch.allclose(cuda.computed.cpu(), cpu.computed) and 0 < cpu.computed.mean() < 1


def test_a_tuned_prefill_serves_a_generation(tmp_path):
    pair, tokens = cuda_pair(), [3 + i // 64 for i in range(300)]
    tuned = tune_sparge(pair, [tokens], tokens=300, l1=0.3)
    tuned.save(tmp_path / "sparge.json")
    prefill = f"sparge:tuned={tmp_path / 'sparge.json'}"
    (result,) = generate(pair, [tokens], method="dense", prefill=prefill, max_new_tokens=4)
    assert result.error is None and 0 < result.prefill_computed <= 1


def test_calibration_gives_the_cpus_mapping():
    tokens = [3 + (7 * i * i + i) % 90 for i in range(300)]
    options = {"tokens": 300, "rounds": 12}
    cpu, cuda = (calibrate(pair, [tokens], **options) for pair in (tiny_pair("qwen2", layers=4), cuda_pair()))
    assert cuda.layer_map.tolist() == cpu.layer_map.tolist()
    assert float((cuda.heads_kv - cpu.heads_kv).abs().max()) < 0.05
    assert cuda.metadata.kl_heads == pytest.approx(cpu.metadata.kl_heads, rel=2e-2)
    assert cuda.heads_kv.device.type == "cpu"


def half_pair(model_type: str = "qwen2", dtype: torch.dtype = torch.float16) -> Pair:
    """The kernels of the fast path take half precision only."""
    pair = make(model_type, layers=4)
    return Pair(pair.name, pair.target.to("cuda", dtype), pair.draft.to("cuda", dtype), pair.tokenizer)


@pytest.mark.parametrize("shape", ["llama2", "llama31", "qwen25", "qwen3"])
@pytest.mark.parametrize(
    "method",
    [
        "specattn:dense_layers=1",
        "specattn:draft_p=0.9",
        "specattn:draft_p=0.9:every_row=true",
        "specattn-paper:aggregate=mean",
    ],
)
def test_rounds_of_kernels_against_modules(shape, method):
    """Dense and sparse rounds in bfloat16: logits by their error, tokens by how far they fall short."""
    report = Report()
    check_rounds(report, shape, SHAPES[shape], parse_method(method), GraphTimer(), torch.device("cuda"))
    assert report.checks and report.failures == []


def launch_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graphs from here on, the same kernels."""
    monkeypatch.setattr("specattn.fast.graph.CapturedRound", lambda run, memory: run)


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("params", [[GREEDY], [SAMPLED, GREEDY, CUT], [GREEDY] * 4])
@pytest.mark.parametrize(
    "method", ["dense", "specattn:p=0.6", "specattn:p=0.4:tail=0.1:seed=3", "specattn:rate=0.2:power=0.8"]
)
def test_captured_rounds_give_the_tokens_of_uncaptured_ones(method, params, gamma, monkeypatch):
    pair = half_pair()
    captured = Rounds(pair, method, fast=True).run(params, 8, gamma)
    launch_one_by_one(monkeypatch)
    assert Rounds(pair, method, fast=True).run(params, 8, gamma) == captured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize(
    "method",
    [
        "specattn:p=0.6:every_row=true",
        "specattn:p=0.4:echo=3",
        "specattn:p=0.6:draft_p=0.8",
        "specattn:p=0.6:draft_p=0.8:every_row=true",
    ],
)
def test_requests_come_and_go_in_captured_rounds(method, sampling, model_type, dtype, monkeypatch):
    """More requests than slots, so that batches shrink and grow and are padded."""
    counts = [9, 25, 1, 14, 30]
    requests = [
        Request(PROMPTS[number % 3], count, sampling, ignore_eos=True) for number, count in enumerate(counts)
    ]
    pair, options = half_pair(model_type, dtype), {"fast": True, "fallback": False, "max_batch": 3}
    captured = serve(pair, requests, method, **options)
    assert [len(result.tokens) for result in captured] == counts
    launch_one_by_one(monkeypatch)
    assert figures(serve(pair, requests, method, **options)) == figures(captured)


@pytest.mark.parametrize("method", ["dense", "specattn:p=0.9:window=200"])
def test_the_engine_takes_the_fast_path(method):
    """The first tokens in half precision; later ones may differ, since rounding does."""
    pair, results = half_pair(), []
    for fast in (False, True):
        options = {"method": method, "mapping": tiny_mapping(pair), "max_batch": 3, "max_new_tokens": 6}
        results.append(generate(pair, PROMPTS, fast=fast, fallback=False, ignore_eos=True, **options))
    assert [result.tokens[:4] for result in results[1]] == [result.tokens[:4] for result in results[0]]


@pytest.mark.parametrize("method", ["dense", "specattn:p=0.6"])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9)])
def test_rounds_neither_wait_for_the_device_nor_allocate(method, sampling):
    pair = half_pair()
    with Engine(
        pair, method=method, mapping=tiny_mapping(pair), gamma=4, fallback=False, max_batch=3, max_tokens=1200
    ) as engine:
        assert engine.path.fast, engine.path.reason
        for prompt in PROMPTS:
            engine.submit(Request(prompt, 300, sampling, ignore_eos=True))
        for _ in range(5):
            engine.advance()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            updates = [update for _ in range(20) for update in engine.advance()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len(updates) == 3 * 20 and all(update.tokens for update in updates)


def shortfall(pair: Pair, prompt: list[int], tokens: list[int]) -> float:
    """How far the logit of a token is below the largest one of a dense pass, at most, in their standard deviations."""
    text = torch.tensor([[*prompt, *tokens]], device="cuda")
    logits = pair.target(text).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, text[0, len(prompt) :, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


@pytest.mark.parametrize("every", [6, "auto"])
@pytest.mark.parametrize("method", ["specattn:p=0.7", "specattn:p=0.7:draft_p=0.8", "self:p=0.8:window=2"])
def test_lossless_cycles_give_the_dense_greedy_tokens(method, every):
    """All but those that rounding decides, in a ragged batch."""
    pair = half_pair()
    options = {"max_new_tokens": 40, "max_batch": 3, "ignore_eos": True, "fast": True}
    mapping = tiny_mapping(pair) if "specattn" in method else None
    lossless = {"lossless": True, "lossless_every": every}
    dense = generate(pair, PROMPTS, method="dense", fallback=False, **options)
    results = generate(pair, PROMPTS, method=method, mapping=mapping, **lossless, **options)
    assert all(result.lossless.dense_passes < 39 for result in results)
    for prompt, result, expected in zip(PROMPTS, results, dense, strict=True):
        assert shortfall(pair, prompt, result.tokens) < 0.02
        assert result.tokens[:4] == expected.tokens[:4]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("method", ["specattn:p=0.6", "specattn:p=0.6:draft_p=0.8", "self:p=0.8:window=2"])
def test_captured_cycles_give_the_tokens_of_uncaptured_ones(method, sampling, monkeypatch):
    counts = [9, 25, 1, 14, 30]
    requests = [
        Request(PROMPTS[number % 3], count, sampling, ignore_eos=True) for number, count in enumerate(counts)
    ]
    pair, options = half_pair(), {"fast": True, "max_batch": 3, "lossless": True, "lossless_every": 6}
    captured = serve(pair, requests, method, **options)
    assert [len(result.tokens) for result in captured] == counts
    launch_one_by_one(monkeypatch)
    assert figures(serve(pair, requests, method, **options)) == figures(captured)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9)])
def test_cycles_neither_wait_for_the_device_inside_nor_allocate(sampling):
    pair = half_pair()
    method, options = "specattn:p=0.6:draft_p=0.8", {"lossless": True, "lossless_every": 12}
    with Engine(
        pair, method=method, mapping=tiny_mapping(pair), max_batch=3, max_tokens=1600, **options
    ) as engine:
        assert engine.path.fast, engine.path.reason
        for prompt in PROMPTS:
            engine.submit(Request(prompt, 400, sampling, ignore_eos=True))
        for _ in range(5):
            engine.advance()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            updates = [update for _ in range(8) for update in engine.advance()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len(updates) == 3 * 8 and all(update.tokens for update in updates)
