"""``bench decode`` on tiny shapes and a tiny pair: everything runs by the references, the times are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_timer import DRAFT, SELECTION, TIMES, HostTimer
from tiny import tiny_mapping, tiny_pair

from specattn import generate
from specattn.benchmarks import cycles, decode, rounds
from specattn.benchmarks.continuation import continue_texts, read_texts
from specattn.benchmarks.rounds import Plan, context_label, expected_tokens
from specattn.benchmarks.setting import FastPair, Setting, Steady
from specattn.benchmarks.shapes import SHAPES, PairShape, Shape
from specattn.errors import CacheFullError, UsageError
from specattn.evaluation.documents import Document
from specattn.fast.cycles import FastCycles
from specattn.fast.operations import references
from specattn.mapping.artifact import Mapping
from specattn.pairs import Pair
from specattn.selection.base import Method
from specattn.selection.registry import parse_method
from specattn.selection.self import Self
from specattn.selection.specattn import SpecAttn

CPU = torch.device("cpu")
TINY = PairShape(Shape("llama", 4, 64, 128, 4, 2, 16, 97), Shape("llama", 2, 32, 64, 2, 1, 16, 96, tied=True))
METHOD = SpecAttn(map="global")
PLAN = Plan([64, 1024], [1, 3], METHOD, gamma=3, density=0.25, acceptance=0.5)
BANDWIDTH = 1e9


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def run(plan: Plan = PLAN) -> Any:
    return decode.run_shapes(["tiny"], plan, HostTimer(), BANDWIDTH, CPU)


@pytest.mark.parametrize(
    ("gamma", "acceptance", "tokens"),
    [(4, 0.7, (1 - 0.7**5) / (1 - 0.7)), (1, 0.5, 1.5), (0, 0.7, 1.0), (3, 0.0, 1.0), (3, 1.0, 4.0)],
)
def test_expected_tokens(gamma: int, acceptance: float, tokens: float) -> None:
    assert expected_tokens(gamma, acceptance) == pytest.approx(tokens)


def test_rows_of_random_weights(tiny: None) -> None:
    report = run()
    cells = [(row["batch"], row["context"], row["mode"]) for row in report.rows]
    modes = ("plain", "dense", "sparse")
    assert cells == [(b, c, mode) for b in (1, 3) for c in (64, 1024) for mode in modes]
    plain, dense, sparse = report.rows[-3:]
    for row in (plain, dense, sparse):
        assert (row["shape"], row["weights"], row["ms"]) == ("tiny", "random", TIMES[row["mode"]])
        share = row["bytes"] / (row["ms"] * 1e-3) / BANDWIDTH
        assert row["copy_bandwidth_fraction"] == pytest.approx(share)
    assert (plain["tokens_a_round"], plain["acceptance"], plain["gamma"]) == (1, None, 0)
    assert dense["tokens_a_round"] == sparse["tokens_a_round"] == 1.875
    assert plain["tokens_per_second"] == pytest.approx(3 / 4e-3)
    assert sparse["tokens_per_second"] == pytest.approx(3 * 1.875 / 5e-3)
    assert sparse["density"] == pytest.approx(0.25, abs=1e-3)
    # Two of four layers read everything.
    assert sparse["kv_read_fraction"] == pytest.approx((1 + 0.25) / 2, abs=1e-3)
    assert dense["kv_read_fraction"] == dense["density"] == 1


def test_a_sparse_draft(tiny: None) -> None:
    """It reads the same share of the context in each step, and a byte a channel of each key once."""
    method = replace(METHOD, draft_p=0.9, draft_keys="int8")
    dense, sparse = run(replace(PLAN, method=method, contexts=[1024])).rows[-2:]
    assert sparse["density"] == pytest.approx(0.25, abs=1e-3)
    token = 2 * 1 * 2 * 16 * 2
    whole, keys = 3 * (3 * 1024 + 1 + 2 + 3) * token, 3 * (1024 + 3) * 2 * (16 + 4)
    lists = 3 * (3 * round(0.25 * (1024 + 3)) - 2 - 1) * token  # without the tokens of later steps
    target = 3 * (1024 + 4) * 4 * 2 * 2 * 16 * 2
    saved = target * (1 - sparse["kv_read_fraction"]) + whole - keys - lists
    assert sparse["bytes"] == pytest.approx(dense["bytes"] - saved)


@pytest.mark.parametrize("keys,nbytes", [("none", 16 * 2), ("int8", 16 + 4)])
def test_a_sparse_drafts_rounds_are_the_mean_of_all_turns(
    tiny: None, monkeypatch: pytest.MonkeyPatch, keys: str, nbytes: int
) -> None:
    """Of two KV heads one is scored each time, the other for one of eight requests."""
    method = replace(METHOD, draft_p=0.9, draft_keys=keys)
    plan = replace(PLAN, method=method, contexts=[1024], batches=[8])
    every = run(plan).rows[-1]
    monkeypatch.setattr(decode, "EXPORTED_HEADS", 2)
    some = run(plan).rows[-1]
    assert every["bytes"] - some["bytes"] == pytest.approx(7 * (1024 + 3) * nbytes)


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, draft_p=0.9, draft_keys="int8")])
def test_a_step_for_the_last_row(tiny: None, method: SpecAttn) -> None:
    """One more of the draft's passes, without its output head, and what it reads of keys and values."""
    plan = replace(PLAN, contexts=[1024])
    usual = run(replace(plan, method=method)).rows
    more = run(replace(plan, method=replace(method, every_row=True))).rows
    assert [row["bytes"] for row in more[-3:-1]] == [row["bytes"] for row in usual[-3:-1]]
    assert more[-1]["density"] == pytest.approx(usual[-1]["density"])
    weights = 2 * (2 * (32 * (2 + 2 * 1 + 2) * 16 + 3 * 32 * 64 + 2 * 32) + 32)
    reads = 3 * (1024 + 4) * 2 * 1 * 2 * 16 * 2
    if method.draft_p < 1:
        # Lists without the tokens of later steps: 2 + 1, or 3 + 2 + 1.
        reads = 3 * (round(0.25 * (1024 + 4)) - 3) * 2 * 1 * 2 * 16 * 2 + 3 * 2 * (16 + 4)
        reads += 3 * 3 * (round(0.25 * (1024 + 4)) - round(0.25 * (1024 + 3))) * 2 * 1 * 2 * 16 * 2
    assert more[-1]["bytes"] - usual[-1]["bytes"] == pytest.approx(weights + reads)


def test_resetting_undoes_what_rounds_changed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "EXPORTED_HEADS", 2)
    pair = decode.random_pair("tiny", TINY, replace(PLAN, method=replace(METHOD, draft_p=0.9)), CPU)
    setting = Setting(pair, 2, 128, 3, 4)
    setting.fill()
    round = setting.round("sparse")
    steady = Steady(round)
    with torch.inference_mode():
        first = round.run()[:, :5].clone()
        table = round.requests.table.clone()
        assert round.drafting.memory.rounds.tolist() == [1, 1, 0]
        steady.reset()
        assert round.drafting.memory.rounds.tolist() == [0, 0, 0]
        assert not torch.equal(round.requests.table, table)
        assert torch.equal(round.run()[:, :5], first)
        assert torch.equal(round.requests.table, table)


def test_parts_of_a_round(tiny: None) -> None:
    plain, dense, sparse = run().rows[-3:]
    assert "draft_ms" not in plain
    assert dense["verification_ms"] == TIMES["dense"] - DRAFT["dense"]
    assert sparse["verification_ms"] == TIMES["sparse"] - DRAFT["sparse"] - SELECTION
    exporting = DRAFT["sparse"] - DRAFT["dense"]
    assert sparse["selection_share"] == pytest.approx((exporting + SELECTION) / TIMES["sparse"])


def test_bytes_of_a_round(tiny: None) -> None:
    plain, dense, sparse = run().rows[-3:]
    # In bfloat16, norms included; the target's embedding gives rows only, the draft's is its output head.
    target = 2 * (4 * (64 * (4 + 2 * 2 + 4) * 16 + 3 * 64 * 128 + 2 * 64) + 64 + 97 * 64)
    draft = 2 * (2 * (32 * (2 + 2 * 1 + 2) * 16 + 3 * 32 * 64 + 2 * 32) + 32 + 96 * 32)
    token, draft_token = 4 * 2 * 2 * 16 * 2, 2 * 1 * 2 * 16 * 2
    assert plain["bytes"] == target + 3 * (1024 + 1) * token
    draft_reads = 3 * (3 * 1024 + 1 + 2 + 3) * draft_token
    assert dense["bytes"] == target + 3 * draft + 3 * (1024 + 4) * token + draft_reads
    saved = 3 * (1024 + 4) * token * (1 - sparse["kv_read_fraction"])
    assert sparse["bytes"] == pytest.approx(dense["bytes"] - saved)


def test_ratios_name_shape_context_and_batch(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RATED", (1024, 3))
    report = run()
    cells = ["tiny_64_b1", "tiny_1k_b1", "tiny_64_b3", "tiny_1k_b3"]
    expected = {f"{cell}_vs_speculation": 8 / 5 for cell in cells}
    expected |= {f"{cell}_vs_plain": 1.875 * 4 / 5 for cell in cells}
    assert report.ratios == pytest.approx(expected | {"selection_overhead": 0.75 / 5})


def test_labels_of_contexts() -> None:
    assert [context_label(n) for n in (2048, 32768, 131072, 1000)] == ["2k", "32k", "128k", "1000"]


def test_the_document(tiny: None) -> None:
    document = run().document("specattn bench decode")
    assert list(document) == ["command", "environment", "gate", "rows", "ratios"]
    assert document["gate"] == "passed" and len(document["rows"]) == 12
    json.dumps(document, allow_nan=False)


def test_shared_pages(tiny: None) -> None:
    report = run(replace(PLAN, batches=[5], contexts=[128], resident=2))
    assert {row["resident"] for row in report.rows} == {2}
    assert report.rows[2]["density"] == pytest.approx(0.25, abs=1e-2)


def test_requests_without_pages_of_their_own_read_others_in_another_order(tiny: None) -> None:
    pair = decode.random_pair("tiny", TINY, PLAN, CPU)
    setting = Setting(pair, 5, 128, 3, 4, resident=2)
    table = setting.target.runner.cache.block_table[:5]
    for slot in (2, 3, 4):
        assert set(table[slot].tolist()) == set(table[slot % 2].tolist())
        assert table[slot].tolist() != table[slot % 2].tolist()
    assert table[2].tolist() != table[4].tolist()


def test_what_does_not_fit_becomes_a_row(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specattn.cache.available_bytes", lambda device: 5 << 18)
    report = run(replace(PLAN, contexts=[64, 4096]))
    skipped = [row for row in report.rows if row["mode"] == "skipped"]
    assert [(row["batch"], row["context"]) for row in skipped] == [(1, 4096), (3, 4096)]
    assert all("1.2 MiB are free" in row["note"] for row in skipped)
    assert set(report.ratios) == {
        f"tiny_64_b{b}_vs_{what}" for b in (1, 3) for what in ("speculation", "plain")
    }


def test_out_of_memory_on_the_way_becomes_a_row(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setting: Setting) -> None:
        if setting.context > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")

    monkeypatch.setattr(Setting, "fill", fail)
    skipped = [row for row in run().rows if row["mode"] == "skipped"]
    assert [row["note"] for row in skipped] == ["CUDA out of memory. Tried to allocate 2 GiB."] * 2


def test_nothing_fits(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "check_memory", refuse)
    with pytest.raises(CacheFullError, match="nothing fits into memory: tiny with random weights needs more"):
        run()


def refuse(needed: int, device: torch.device, what: str) -> None:
    raise CacheFullError(f"{what} needs more")


# The gate


@pytest.mark.parametrize(
    "broken", ["sparse_attention", "dense_attention", "export_attention", "add_norm", "norm_rope_linear"]
)
def test_a_wrong_operation_fails_the_gate(tiny: None, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = references()

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = getattr(right, broken)(*arguments, **options)
        return tuple(part * 1.1 for part in result) if isinstance(result, tuple) else result.mul_(0.8)

    monkeypatch.setattr(
        "specattn.fast.decoder.operations_for", lambda device: replace(right, **{broken: wrong})
    )
    report = run()
    assert report.gate == "failed"
    assert report.document("")["rows"] == [] and report.rows == []


def test_lists_that_miss_half_fail_the_gate(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = references()

    def wrong(*arguments: Any, out: Any, **options: Any) -> Any:
        right.nucleus_lists(*arguments, out=out, **options)
        out.counts.div_(2, rounding_mode="floor")
        out.indices[torch.arange(out.indices.shape[-1]) >= out.counts[..., None]] = -1

    operations = replace(right, nucleus_lists=wrong)
    monkeypatch.setattr("specattn.fast.decoder.operations_for", lambda device: operations)
    failed = {check.name for check in run().failures}
    assert any(name.startswith("tiny, sparse round") for name in failed)
    assert not any("dense" in name for name in failed)


def test_a_graph_that_replays_something_else_fails_the_gate(tiny: None) -> None:
    class Forgetful(HostTimer):
        def capture(self, run: Any) -> Any:
            report = run()
            return lambda: report + 1

    report = decode.run_shapes(["tiny"], PLAN, Forgetful(), BANDWIDTH, CPU)
    assert {check.name for check in report.failures} == {
        f"tiny, {mode} round: CUDA graph" for mode in ("dense", "sparse")
    }


# A pair that exists


@pytest.fixture(scope="module")
def pair() -> tuple[Pair, Mapping]:
    made = tiny_pair("qwen2", layers=4, max_positions=512)
    return made, tiny_mapping(made)


def documents(count: int, length: int) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    return [
        Document(f"text {n}", torch.randint(3, 96, (length,), generator=generator).tolist())
        for n in range(count)
    ]


def test_rows_of_a_pair_that_exists(pair: tuple[Pair, Mapping]) -> None:
    models, mapping = pair
    plan = Plan([96, 128], [3], METHOD, gamma=2)
    report = decode.run_pair(models, mapping, documents(2, 129), plan, HostTimer(), BANDWIDTH)
    assert report.gate == "passed"
    plain, dense, sparse = report.rows[-3:]
    assert {row["shape"] for row in report.rows} == {"real"} and sparse["weights"] == "trained"
    assert plain["tokens_a_round"] == 1 and plain["acceptance"] is None
    for row in (dense, sparse):
        assert row["acceptance"] == pytest.approx((row["tokens_a_round"] - 1) / 2)
        assert (row["texts"], row["ms"]) == (2, TIMES[row["mode"]]) and row["wall_ms"] > 0
        assert row["top1_agreement"] == 1 if row["mode"] != "sparse" else 0 < row["top1_agreement"] <= 1
    assert 0 < sparse["density"] < 1
    speed_up = sparse["tokens_per_second"] / dense["tokens_per_second"]
    assert report.ratios["real_128_b3_vs_speculation"] == pytest.approx(speed_up)


@pytest.mark.parametrize("drawn", [{"rate": 0.2}, {"tail": 0.1, "power": 0.8}])
def test_what_a_pair_that_exists_draws_is_timed(pair: tuple[Pair, Mapping], drawn: dict[str, float]) -> None:
    models, mapping = pair
    plan = Plan([96], [2], replace(METHOD, **drawn), gamma=2)
    report = decode.run_pair(models, mapping, documents(2, 97), plan, HostTimer(), BANDWIDTH)
    assert report.gate == "passed" and 0 < report.rows[-1]["density"] < 1


def test_lossless_cycles_of_a_pair_that_exists(
    pair: tuple[Pair, Mapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "CYCLES", 5)
    models, mapping = pair
    plan = Plan([96], [3], replace(METHOD, draft_p=0.9, every_row=True), gamma=2, lossless=5)
    report = decode.run_pair(models, mapping, documents(2, 97), plan, HostTimer(), BANDWIDTH)
    assert report.gate == "passed"
    *_, dense, _, lossless = report.rows
    assert (lossless["mode"], lossless["texts"], lossless["batch"]) == ("lossless", 2, 3)
    assert lossless["dense_reads_per_token"] == pytest.approx(1 / lossless["tokens_a_round"])
    assert 1 <= lossless["tokens_a_round"] <= lossless["tokens_ahead"] <= 7
    assert lossless["tokens_ahead"] == pytest.approx(
        lossless["sparse_rounds"] * (1 + 2 * lossless["acceptance"])
    )
    assert lossless["tokens_per_second"] == pytest.approx(3e3 * lossless["tokens_a_round"] / lossless["ms"])
    speed_up = lossless["tokens_per_second"] / dense["tokens_per_second"]
    assert report.ratios["real_96_b3_lossless_vs_speculation"] == pytest.approx(speed_up)


def test_a_dense_pass_that_verifies_nothing_fails_the_gate(
    pair: tuple[Pair, Mapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "CYCLES", 3)
    monkeypatch.setattr("specattn.fast.cycle.winners", lambda logits, *_: logits.argmin(-1))
    models, mapping = pair
    plan = Plan([96], [2], METHOD, gamma=2, lossless=4)
    report = decode.run_pair(models, mapping, documents(2, 97), plan, HostTimer(), BANDWIDTH)
    assert [check.name for check in report.failures] == [
        "real, lossless cycles, batch 2, context 96: what is delivered"
    ]


def test_lossless_cycles_without_the_draft(
    pair: tuple[Pair, Mapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "CYCLES", 3)
    models, mapping = pair
    plan = Plan([96], [2], METHOD, gamma=2, lossless=4, lossless_method=parse_method("self:p=0.8"))
    report = decode.run_pair(models, mapping, documents(2, 97), plan, HostTimer(), BANDWIDTH)
    lossless = report.rows[-1]
    assert (lossless["mode"], lossless["method"], lossless["gamma"]) == ("lossless", "self:p=0.8", 0)
    assert lossless["acceptance"] is None and lossless["tokens_ahead"] == lossless["sparse_rounds"] == 4
    assert 0.2 < lossless["kv_read_fraction"] < 1


@pytest.mark.parametrize("method", [METHOD, Self(p=0.6, dense_layers=0)])
def test_lossless_cycles_continue_as_the_target_does(pair: tuple[Pair, Mapping], method: Method) -> None:
    models, mapping = pair
    assert models.draft is not None
    texts, made = documents(2, 97), []

    class Kept(FastCycles):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    fast = FastPair.of("pair", models.target, models.draft, mapping, METHOD, 400)
    setting = Setting(fast, 3, 96, 2, room=cycles.room(4, 2))
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(cycles, "FastCycles", Kept)
        patched.setattr(cycles, "CYCLES", 3)
        starts = read_texts(setting, texts)
        found = cycles.continue_losslessly(setting, starts, method, 4)
    assert found.read < found.full
    for request, start in enumerate(starts.requests):
        prompt = texts[request % 2].tokens[: start.length + 1]
        result = generate(models, [prompt], method="dense", max_new_tokens=50, ignore_eos=True)[0]
        text = prompt + list(result.tokens)
        length, _, *recent = made[0]._shared.requests.table[request].tolist()
        assert length >= start.length + 7
        assert recent == text[length - 1 : length + 1]


def test_continuations_are_those_of_generate(pair: tuple[Pair, Mapping]) -> None:
    models, mapping = pair
    timer = HostTimer(repeats=5)
    assert models.draft is not None
    fast = FastPair.of("pair", models.target, models.draft, mapping, METHOD, 160)
    setting = Setting(fast, 3, 96, 2, room=18)
    texts = documents(2, 97)
    with torch.inference_mode():
        starts = read_texts(setting, texts)
        assert [start.length for start in starts.requests] == [96, 96, 93]
        for mode in ("dense", "plain", "dense"):
            round = setting.round(mode)
            continue_texts(setting, round, starts, timer)
            for request, start in enumerate(starts.requests):
                prompt = texts[request % 2].tokens[: start.length + 1]
                result = generate(models, [prompt], method="dense", max_new_tokens=24, ignore_eos=True)[0]
                text = prompt + list(result.tokens)
                length, _, *recent = round.requests.table[request].tolist()
                assert length >= start.length + 5
                assert recent == text[length - 1 : length + 1]


def test_a_pair_without_a_fast_path(pair: tuple[Pair, Mapping]) -> None:
    models, mapping = pair
    plan = Plan([96], [1], replace(METHOD, aggregate="union"))
    with pytest.raises(UsageError, match="aggregate=mean only"):
        decode.run_pair(models, mapping, documents(1, 97), plan, HostTimer(), BANDWIDTH)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma=0"),
        ({"density": 1.5}, "density 1.5"),
        ({"acceptance": -0.1}, "acceptance -0.1 must lie between 0 and 1"),
        ({"contexts": [2048, 24]}, "context 24 is below 25"),
        (
            {"contexts": [80], "method": replace(METHOD, draft_p=0.9, every_row=True)},
            "context 80 is below 81",
        ),
    ],
)
def test_plans_that_cannot_be_timed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PLAN, **options).check()


def test_beside_vllm(tiny: None, tmp_path: Path) -> None:
    report = run()
    path = tmp_path / "vllm.json"
    rows = [
        {"shape": "tiny", "batch": 3, "context": 64, "mode": "plain", "tokens_per_second": 500.0},
        {"shape": "tiny", "batch": 3, "context": 1024, "mode": "plain", "tokens_per_second": 1000.0},
        {"shape": "other", "batch": 1, "context": 64, "mode": "plain", "tokens_per_second": 1.0},
    ]
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    decode.compare_with_vllm(report, decode.read_vllm(path))
    assert report.ratios["dense_vs_vllm"] == pytest.approx(0.75)
    assert decode.read_vllm(None) == []
    decode.check_vllm(rows, ["tiny"], PLAN)
    decode.check_vllm([], ["tiny"], PLAN)
    with pytest.raises(UsageError, match="--shape other --batch 1 --context 64"):
        decode.check_vllm(rows[2:], ["tiny"], PLAN)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"mode": "plain"}]}', '{"rows": [{"shape": "tiny"}]}'])
def test_files_that_hold_nothing_of_vllm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"vllm\.json holds no rows"):
        decode.read_vllm(path)
