"""Errors of attention outputs in real passes of tiny models, and the script that counts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script
from tiny import tiny_mapping, tiny_pair

import specattn
from specattn.evaluation.documents import Document
from specattn.evaluation.fidelity import evaluate
from specattn.evaluation.output_error import LayerErrors, OutputErrors
from specattn.selection.registry import parse_method

SCRIPT = Path(__file__).parents[2] / "examples/verified_rate.py"
PAIR = tiny_pair("qwen2", layers=4)
HEADS = PAIR.target.config.num_attention_heads
CONTEXT, ROWS, GAMMA = 60, 9, 2


def document() -> Document:
    tokens = torch.randint(3, PAIR.vocab_size, (CONTEXT + 1,), generator=torch.Generator().manual_seed(0))
    return Document("text", tokens.tolist())


def observe(eps: float, text: str, **changes) -> list[LayerErrors]:
    errors = OutputErrors(eps)
    list(
        evaluate(
            PAIR,
            [document()],
            [parse_method(text)],
            context=CONTEXT,
            rows=ROWS,
            gamma=GAMMA,
            observer=lambda step, call, selection, output: errors(
                step, call, replace(selection, **changes), output
            ),
        )
    )
    return errors.layers()


def script() -> ModuleType:
    return load_script("examples/verified_rate.py")


def test_everything_read_is_exact():
    layers = observe(1e-4, "streaming:budget=1:dense_layers=1")
    assert [each.layer for each in layers] == [1, 2, 3]
    for each in layers:
        assert each.violations == each.joined_violations == 0
        assert each.mean_error < 1e-5 and each.read == 1 and each.capped == 0
        assert each.outputs == ROWS * HEADS and each.joined == ROWS


def test_a_window_misses_and_the_tolerance_decides_what_counts():
    method = "streaming:budget=6:sink=2"
    middle = observe(0, method)[0].mean_error
    found = [observe(eps, method)[0] for eps in (1e-6, middle, 1e6)]
    assert found[0].violations == found[0].outputs and found[2].violations == 0
    assert 0 < found[1].violations < found[1].outputs
    assert found[0].joined_violations == found[0].joined and found[2].joined_violations == 0
    assert found[0].read == pytest.approx(3 * (6 + 3) / (54 + 57 + 60)), "of each round's visible tokens"


def test_lists_that_were_cut_short_are_counted():
    kv_heads = PAIR.target.config.num_key_value_heads
    capped = (torch.arange(kv_heads) == 0)[None]
    assert observe(0.1, "streaming:budget=0.5", capped=capped)[0].capped == 1 / kv_heads


def test_the_script_reports_each_tolerance(monkeypatch, tmp_path, capsys):
    module = script()
    monkeypatch.setattr(specattn, "load_pair", lambda name, device: PAIR)
    monkeypatch.setattr(module.Mapping, "load", lambda path: tiny_mapping(PAIR))
    monkeypatch.setattr(module, "load_documents", lambda *_: [document()])
    out = tmp_path / "rates.json"
    flags = f"--text x --mapping m --context {CONTEXT} --rows {ROWS} --eps 0.3 0.9 --p 0.3 --pilot 32".split()
    module.main([*flags, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [each["options"]["eps"] for each in report["results"]] == [0.3, 0.9]
    for each in report["results"]:
        assert [layer["layer"] for layer in each["layers"]] == [2, 3]
        assert 0 <= each["violation_rate"] <= each["worst_layer_rate"] <= 1
        assert 0 < each["kv_read_fraction"] <= 1.5
    assert capsys.readouterr().err.count("off by more") == 2


def test_the_script_refuses_before_it_loads():
    with pytest.raises(specattn.UsageError, match=r"eps=1\.5 is outside"):
        script().main(["--text", "x", "--eps", "1.5"])
