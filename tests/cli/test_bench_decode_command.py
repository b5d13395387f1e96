"""``specattn bench decode``: refusals, what reaches the benchmark, the document, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import document, run

from specattn.benchmarks import decode, kernels, timing
from specattn.benchmarks.report import Report


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a run is asked for, and the report that it will give, without a GPU."""
    found = SimpleNamespace(report=Report(), asked=None)
    for context, speed in ((2048, 60.0), (8192, 180.0)):
        for mode, rate in {"plain": 50.0, "dense": 100.0, "sparse": speed}.items():
            row: dict[str, Any] = {"shape": "llama2", "weights": "random", "batch": 1, "context": context}
            found.report.row(**row, mode=mode, ms=3.25, tokens_per_second=rate)
    found.report.row(shape="llama2", batch=1, context=131072, mode="skipped", note="too large")
    found.report.ratio("llama2_2k_b1_vs_speculation", 0.6)

    def pretend(*asked: Any) -> Report:
        found.asked = asked
        return found.report

    monkeypatch.setattr(kernels, "check_gpu", lambda: None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(decode, "run_shapes", pretend)
    monkeypatch.setattr(decode, "run_pair", pretend)
    return found


def test_the_document_and_what_people_see(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.report.check("rounds", 0.0, 1e-2)
    out, plot = tmp_path / "decode.json", tmp_path / "decode.png"
    result = run("bench", "decode", "--shape", "llama2", "--json", "--out", out, "--plot", plot)
    found = document(result)
    assert found == json.loads(out.read_text(encoding="utf-8"))
    assert list(found) == ["command", "environment", "gate", "rows", "ratios", "crossover"]
    assert found["command"].startswith("specattn bench decode --shape llama2 --repeats 50 --gamma 4")
    assert found["gate"] == "passed" and len(found["rows"]) == 7
    assert found["crossover"][0]["crossover"] == pytest.approx(2048 * 4 ** (1 / 3))
    assert len(result.stdout.splitlines()) == 1
    for part in ("random weights, acceptance and density imposed", "3.25", "too large", "3251", "passed"):
        assert part in result.stderr, part
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_asked_for(bench: SimpleNamespace) -> None:
    bench.report.check("rounds", 0.0, 1e-2)
    options = "--shape llama2 --shape qwen3 --context 8192 --context 2048 --batch 4 --gamma 6 --density 0.2"
    more = "--acceptance 0.8 --repeats 9 --resident 2 --method specattn:p=0.9:map=global"
    result = run("bench", "decode", *options.split(), *more.split())
    assert result.exit_code == 0, result.stderr
    names, plan, timer, bandwidth, device = bench.asked
    assert (names, timer.repeats, bandwidth, device.type) == (["llama2", "qwen3"], 9, 4e12, "cuda")
    assert (plan.contexts, plan.batches, plan.gamma, plan.resident) == ([2048, 8192], [4], 6, 2)
    assert (plan.density, plan.acceptance, plan.method.p, plan.method.map) == (0.2, 0.8, 0.9, "global")


def test_a_pair_that_exists(bench: SimpleNamespace, tiny: SimpleNamespace) -> None:
    bench.report.check("rounds", 0.0, 1e-2)
    models = [option for option in tiny.models if option not in ("--device", "cpu")]
    sizes = ["--context", 96, "--batch", 2, "--repeats", 5, "--lossless", "--lossless-every", 4]
    sizes += ["--lossless-method", "self:p=0.8"]
    result = run("bench", "decode", *models, "--mapping", tiny.mapping, "--text", tiny.text, *sizes)
    assert result.exit_code == 0, result.stderr
    pair, mapping, texts, plan, timer, _ = bench.asked
    # Three heads are asked for, and groups have two.
    assert pair.target.config.num_hidden_layers == 3 and mapping.global_heads.numel() == 4
    assert [len(text.tokens) for text in texts] == [97]
    assert (plan.contexts, plan.batches, timer.repeats) == ([96], [2], 5)
    assert (plan.lossless, plan.lossless_method.spec()) == (4, "self:p=0.8")


def test_no_timings_after_a_check_that_failed(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.report.check("rounds", float("nan"), 1e-2)
    plot = tmp_path / "decode.png"
    result = run("bench", "decode", "--json", "--plot", plot)
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (found["gate"], found["rows"], found["ratios"], found["crossover"]) == ("failed", [], {}, [])
    assert "failed: rounds" in result.stderr and "3.25" not in result.stderr
    assert not plot.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    result = run("bench", "decode")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape llama4", "unknown shape 'llama4'"),
        ("--density 0", "density 0 must lie between 0 and 1"),
        ("--acceptance 2", "acceptance 2 must lie between 0 and 1"),
        ("--context 8", "context 8 is below 26"),
        ("--gamma 65", "gamma=65"),
        ("--method quest", "method 'quest' has no fast path yet"),
        ("--method dense", "method 'dense' selects nothing"),
        ("-o aggregate=union", "aggregate=mean only"),
        ("--method specattn:tail=0.1", "cannot be imposed"),
        ("--method specattn:rate=0.1", "cannot be imposed"),
        ("--pair qwen2.5-coder", "give one with --text FILE"),
        ("--pair qwen2.5-coder --shape llama2 --text book.txt", "leave it out"),
        ("--text book.txt", "name a pair"),
        ("--lossless", "name a pair"),
        ("--lossless-every 8", "no effect without lossless"),
        ("--lossless-method self", "no effect without --lossless"),
        ("--pair qwen2.5-coder --text book.txt --lossless --lossless-method oracle", "has no fast path yet"),
        ("--pair qwen2.5-coder --text book.txt --lossless --lossless-every 65", "lossless_every=65"),
        ("--vllm missing.json", "missing.json holds no rows of vLLM"),
        ("--out missing/file.json", "the folder missing does not exist"),
        ("--plot speed.xyz", "'.xyz' is not one of"),
    ],
)
def test_refusals_come_before_the_gpu_is_asked(arguments: str, message: str) -> None:
    result = run("bench", "decode", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_too_many_rounds_for_the_context(bench: SimpleNamespace, tiny: SimpleNamespace) -> None:
    models = [option for option in tiny.models if option not in ("--device", "cpu")]
    result = run("bench", "decode", *models, "--text", tiny.text, "--context", 500)
    assert result.exit_code == 2
    assert "come to 755 and the models' context ends at 512" in result.stderr
