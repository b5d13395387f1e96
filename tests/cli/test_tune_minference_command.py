"""``specattn tune minference``: the file, its summary, and what it refuses before any model is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, record_progress, run

from specattn.prefill.head_patterns import HeadPatterns

SIZES = ["--tokens", 300, "--budget", 0.7]


@pytest.fixture(scope="module")
def target(tiny: SimpleNamespace) -> list[object]:
    return ["--target", tiny.folder / "target", "--dtype", "float32", "--device", "cpu"]


def test_the_summary_says_what_the_file_says(tiny: SimpleNamespace, target, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    result = run("tune", "minference", "--text", tiny.text, "--out", out, *SIZES, *target, "--json")
    report, patterns = document(result), HeadPatterns.load(out)
    assert (report["patterns"], report["tokens"], report["budget"]) == (str(out), 300, 0.7)
    assert report["error"] == patterns.error
    for layer, heads in zip(report["layers"], patterns.layers, strict=True):
        assert layer == {
            kind: sum(head.kind == kind for head in heads)
            for kind in ("a-shape", "vertical-slash", "block-sparse")
        }
        assert sum(layer.values()) == len(heads) > 0
    assert list(report["seconds"]) == ["load", "tune"]
    assert f"{patterns.error:.1%}" in result.stderr


def test_the_file_serves_generation_and_evaluation(tiny: SimpleNamespace, target, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    tuned = run("tune", "minference", "--text", tiny.text, "--out", out, *SIZES, *target)
    assert tuned.exit_code == 0, tuned.stderr
    prompt = tiny.text.read_text(encoding="utf-8")[:400]
    options = ["--max-new-tokens", 4, "--mapping", tiny.mapping, *tiny.models, "--json"]
    report = document(run("generate", prompt, "--prefill", f"minference:tuned={out}", *options))
    assert report["prefill"] == f"minference:tuned={out}"
    assert 0 < report["prefill_computed"] < 1.5


def test_progress_has_the_right_total(
    tiny: SimpleNamespace, target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.tune_minference")
    texts = ["--text", tiny.text, "--text", tiny.text]
    assert run("tune", "minference", *texts, "--out", tmp_path / "a.json", *SIZES, *target).exit_code == 0
    layers = 2 * tiny.pair.target.config.num_hidden_layers
    assert shown == {"layers": [layers, layers]}


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["--budget", 0], "budget=0"),
        (["--budget", 0.01], "own blocks"),
        (["--out", "no/such/folder/heads.json"], "does not exist"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_read(
    tiny: SimpleNamespace,
    target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list,
    named: str,
) -> None:
    monkeypatch.setattr("specattn.cli.models.Models.load", None)
    monkeypatch.chdir(tmp_path)
    result = run("tune", "minference", "--text", tiny.text, "--tokens", 300, *arguments, *target)
    assert result.exit_code == 2 and named in result.stderr


def test_an_existing_file_is_kept_unless_forced(tiny: SimpleNamespace, target, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    out.write_text("mine")
    options = ["tune", "minference", "--text", tiny.text, "--out", out, *SIZES, *target]
    refused = run(*options)
    assert refused.exit_code == 2 and "--force" in refused.stderr and out.read_text() == "mine"
    assert run(*options, "--force").exit_code == 0
    assert json.loads(out.read_text())["kind"] == "specattn-minference"


def test_the_patterns_of_another_model_are_refused(tiny: SimpleNamespace, target, tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    draft = ["--target", tiny.folder / "draft", "--dtype", "float32", "--device", "cpu"]
    assert run("tune", "minference", "--text", tiny.text, "--out", out, *SIZES, *draft).exit_code == 0
    result = run(
        "generate", "a book", "--mapping", tiny.mapping, "--prefill", f"minference:tuned={out}", *tiny.models
    )
    assert result.exit_code == 2 and "were chosen for" in result.stderr
