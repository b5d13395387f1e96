"""The script that times vLLM, with a stand-in for its engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from scripts import load_script
from transformers import AutoConfig

from specattn.benchmarks.decode import read_vllm
from specattn.benchmarks.shapes import SHAPES, Shape


class Engine:
    """Reads the prompts one after the other, a step each, and lets ``running`` requests decode at once."""

    def __init__(self, running: int) -> None:
        self.running, self.left, self.begun = running, {}, 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert max(prompt["prompt_token_ids"]) < 32000 and len(prompt["prompt_token_ids"]) == 64
        self.left[name] = params.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[str]:
        self.begun = min(self.begun + 1, self.running)
        served = list(self.left)[: self.begun]
        for name in served:
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
        return served


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **options: SimpleNamespace(**options)
    vllm.LLM = lambda **options: SimpleNamespace(llm_engine=Engine(options["max_num_seqs"]))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    module = load_script("benchmarks/vllm_decode.py")
    monkeypatch.setattr(module, "version", lambda name: "0")
    return module


def test_rows_that_the_benchmark_reads(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "vllm.json"
    cells = "--shape llama2 --context 64 --batch 3 --batch 1 --steps 5"
    monkeypatch.setattr(sys, "argv", ["vllm_decode.py", *cells.split(), "--out", str(out)])
    script.main()
    rows = read_vllm(out)
    assert [(row["shape"], row["batch"], row["context"], row["mode"]) for row in rows] == [
        ("llama2", 1, 64, "plain"),
        ("llama2", 3, 64, "plain"),
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_only_steps_of_the_whole_batch_count(script: ModuleType) -> None:
    engine = Engine(3)
    # 16 tokens each: the third request begins in the third step, the first ends in the sixteenth.
    assert script.tokens_needed(3, 64, 5) == 16
    assert len(script.step_times(engine, 32000, 3, 64, 5)) == 16 - 3


def test_a_batch_that_never_runs_whole_is_skipped(script: ModuleType) -> None:
    found = script.row(SimpleNamespace(llm_engine=Engine(2)), "llama2", 3, 64, 5)
    assert found["mode"] == "skipped" and "too large" in found["note"]


@pytest.mark.parametrize("name", SHAPES)
def test_folders_of_all_shapes(script: ModuleType, name: str, tmp_path: Path) -> None:
    shape = SHAPES[name].target
    script.write_config(shape, tmp_path, 40_000)
    config = AutoConfig.from_pretrained(tmp_path)
    assert Shape.of(config) == shape
    assert config.max_position_embeddings == 40_000 and config.architectures[0].endswith("ForCausalLM")
