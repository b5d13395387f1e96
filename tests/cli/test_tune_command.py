"""``specattn tune sparge``: the file, its summary, and what it refuses before any model is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, record_progress, run

from specattn.cli.models import DEFAULT_PAIR, Models
from specattn.pairs import BUILTIN
from specattn.prefill.tune import tune_sparge
from specattn.prefill.tuned import TunedThresholds

TOKENS = 200


def target(tiny: SimpleNamespace) -> list[object]:
    return ["--target", tiny.folder / "target", "--dtype", "float32", "--device", "cpu"]


def tune(tiny: SimpleNamespace, *arguments: object):
    return run("tune", "sparge", "--text", tiny.text, "--tokens", TOKENS, *arguments, *target(tiny))


def test_the_file_is_that_of_the_library_and_the_summary_says_what_it_holds(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "sparge.json"
    result = tune(tiny, "--l1", 0.4, "--out", out, "--json")
    report, tuned = document(result), TunedThresholds.load(out)
    text = tiny.text.read_text(encoding="utf-8")
    expected = tune_sparge(tiny.pair, [text], tokens=TOKENS, l1=0.4)
    assert (tuned.theta, tuned.tau, tuned.lam) == (expected.theta, expected.tau, expected.lam)
    assert tuned.target_hash == expected.target_hash and tuned.text_hash == expected.text_hash
    assert (report["tokens"], report["l1"], report["int8"], report["heads"]) == (TOKENS, 0.4, True, 12)
    assert report["dense_heads"] == sum(value == 1 for row in tuned.tau for value in row)
    assert report["worst_l1"] == max(value for row in tuned.l1 for value in row) <= 0.4
    assert report["sparsity"] == pytest.approx(sum(map(sum, tuned.sparsity)) / 12)
    assert [layer["worst_l1"] for layer in report["layers"]] == [max(row) for row in tuned.l1]
    assert list(report["seconds"]) == ["load", "tune"] and report["environment"]["device"] == "cpu"
    assert f"{report['sparsity']:.1%}" in result.stderr and str(out.name) in result.stderr


def test_the_file_serves_a_generation(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "sparge.json"
    assert tune(tiny, "--no-int8", "--out", out).exit_code == 0
    assert TunedThresholds.load(out).int8 is False
    prefill = ["--prefill", f"sparge:tuned={out}"]
    result = run(
        "generate", "the draft", "--method", "dense", "--max-new-tokens", 2, *prefill, *tiny.models, "--json"
    )
    assert document(result)["prefill"] == f"sparge:tuned={out}"


def test_progress_has_the_right_totals(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.tune")
    assert tune(tiny, "--text", tiny.text, "--out", tmp_path / "a.json").exit_code == 0
    assert shown == {"theta and tau": [2 * TOKENS] * 2, "lam": [2 * TOKENS] * 2}


@pytest.mark.parametrize("pair,named", [(None, None), (DEFAULT_PAIR, None), (None, "folder")])
def test_only_the_target_of_a_pair_is_read(pair: str | None, named: str | None) -> None:
    models = Models(pair, named, None, "cpu", None).without_draft()
    assert (models.pair, models.draft) == (None, None)
    assert models.target == (named or BUILTIN[DEFAULT_PAIR].target)


@pytest.fixture
def refused(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was read")

    def call(*arguments: object) -> str:
        monkeypatch.setattr("specattn.pairs.load.load_model", load)
        result = tune(tiny, *arguments)
        assert result.exit_code == 2, result.stderr
        assert result.stderr.startswith("error: ") and result.stdout == ""
        return result.stderr

    return call


def test_refusals(refused, tmp_path: Path) -> None:
    out = tmp_path / "sparge.json"
    assert "l1=1.5 is outside (0, 1)" in refused("--l1", 1.5, "--out", out)
    assert "missing.txt" in refused("--text", tmp_path / "missing.txt", "--out", out)
    assert "does not exist" in refused("--out", tmp_path / "nowhere" / "sparge.json")
    out.write_text("precious")
    assert "--force" in refused("--out", out)
    assert out.read_text() == "precious"
    assert "unknown pair 'qwen'" in run("tune", "sparge", "--text", __file__, "--pair", "qwen").stderr


def test_force_replaces_the_file(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "sparge.json"
    out.write_text("worthless")
    assert tune(tiny, "--out", out, "--force").exit_code == 0
    assert TunedThresholds.load(out).tokens == TOKENS


def test_a_text_that_is_too_short_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the draft reads", encoding="utf-8")
    result = run(
        "tune", "sparge", "--text", short, "--out", tmp_path / "s.json", "--tokens", 96, *target(tiny)
    )
    assert result.exit_code == 2
    assert "96" in result.stderr.splitlines()[-1] and not (tmp_path / "s.json").exists()
