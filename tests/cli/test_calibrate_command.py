"""``specattn calibrate``: the mapping, its summary, and what it refuses before any model is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, record_progress, run

from specattn.cli.calibrate import Metric
from specattn.mapping import Mapping
from specattn.mapping.similarity import METRICS


def test_the_summary_says_what_the_file_says(tiny: SimpleNamespace) -> None:
    report, mapping = document(tiny.calibrated), Mapping.load(tiny.mapping)
    assert report["mapping"] == str(tiny.mapping)
    assert report["layer_map"] == mapping.layer_map.tolist()
    assert report["global_heads"] == mapping.global_heads.tolist() and len(report["global_heads"]) == 4
    for figure in ("metric", "tokens", "rounds", "kl_layer_map", "kl_global", "kl_heads"):
        assert report[figure] == getattr(mapping.metadata, figure), figure
    assert (report["metric"], report["tokens"], report["rounds"]) == ("kl", 128, 8)
    assert list(report["seconds"]) == ["load", "calibrate"]
    assert report["environment"]["device"] == "cpu"


def test_people_see_the_layer_map_and_three_divergences(tiny: SimpleNamespace) -> None:
    report, shown = document(tiny.calibrated), tiny.calibrated.stderr
    for figure in ("kl_layer_map", "kl_global", "kl_heads"):
        assert f"{report[figure]:.4f}" in shown
    assert "layer map: " + " ".join(map(str, report["layer_map"])) in shown


def test_several_texts_another_metric_and_a_plot(tiny: SimpleNamespace, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text(tiny.text.read_text(encoding="utf-8")[50:], encoding="utf-8")
    out, plot = tmp_path / "mapping.safetensors", tmp_path / "map.svg"
    files = ["--text", tiny.text, "--text", second, "--out", out, "--plot", plot]
    sizes = ["--tokens", 96, "--rounds", 4, "--heads", 2, "--metric", "js", "--gamma", 2, "--seed", 7]
    report = document(run("calibrate", *files, *sizes, *tiny.models, "--json"))
    assert (report["metric"], report["rounds"]) == ("js", 8)
    assert Mapping.load(out).metadata.metric == "js"
    assert b"<svg" in plot.read_bytes()


def test_progress_has_the_right_totals(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.calibrate")
    sizes = ["--tokens", 96, "--rounds", 4, "--out", tmp_path / "mapping.safetensors"]
    assert run("calibrate", "--text", tiny.text, *sizes, *tiny.models).exit_code == 0
    passes, unknown = shown.pop("mixture")
    assert passes > 1 and unknown is None
    assert shown == {"target": [96, 96], "draft": [96, 96]}


def test_every_metric_can_be_chosen() -> None:
    assert {metric.value for metric in Metric} == set(METRICS)


@pytest.fixture
def refused(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was read")

    def call(*arguments: object) -> str:
        monkeypatch.setattr("specattn.pairs.load.load_pair", load)
        monkeypatch.setattr("specattn.pairs.load_pair", load, raising=False)
        result = run("calibrate", "--tokens", 96, "--rounds", 4, *arguments, *tiny.models)
        assert result.exit_code == 2, result.stderr
        assert result.stderr.startswith("error: ") and result.stdout == ""
        return result.stderr

    return call


def test_an_existing_mapping_is_kept_unless_forced(refused, tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "mapping.safetensors"
    out.write_bytes(b"precious")
    assert "--force" in refused("--text", tiny.text, "--out", out)
    assert out.read_bytes() == b"precious"


def test_force_replaces_a_mapping(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "mapping.safetensors"
    out.write_bytes(b"worthless")
    result = run(
        "calibrate", "--text", tiny.text, "--out", out, "--force", "--tokens", 96, "--rounds", 4, *tiny.models
    )
    assert result.exit_code == 0, result.stderr
    assert Mapping.load(out).metadata.tokens == 96


def test_places_that_cannot_be_written_are_refused(refused, tiny: SimpleNamespace, tmp_path: Path) -> None:
    text = ["--text", tiny.text]
    assert "does not exist" in refused(*text, "--out", tmp_path / "nowhere" / "mapping.safetensors")
    assert "is a folder" in refused(*text, "--out", tmp_path)
    out = ["--out", tmp_path / "mapping.safetensors"]
    assert "does not exist" in refused(*text, *out, "--plot", tmp_path / "nowhere" / "map.png")
    assert "'.doc' is not one of" in refused(*text, *out, "--plot", tmp_path / "map.doc")
    assert "no ending" in refused(*text, *out, "--plot", tmp_path / "map")


def test_a_folder_without_permission_is_refused(
    refused, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    assert "cannot be written" in refused("--text", tiny.text, "--out", tmp_path / "mapping.safetensors")


def test_a_plot_without_matplotlib_is_refused(
    refused, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specattn.cli.output.find_spec", lambda name: None)
    out = ["--out", tmp_path / "mapping.safetensors"]
    assert "specattn[plot]" in refused("--text", tiny.text, *out, "--plot", tmp_path / "map.png")


def test_every_text_is_read_first(refused, tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "mapping.safetensors"]
    assert "missing.txt" in refused("--text", tiny.text, "--text", tmp_path / "missing.txt", *out)
    (tmp_path / "empty.txt").touch()
    assert "empty" in refused("--text", tmp_path / "empty.txt", *out)


def test_a_text_that_is_too_short_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the draft reads", encoding="utf-8")
    result = run(
        "calibrate", "--text", short, "--out", tmp_path / "m.safetensors", "--tokens", 96, *tiny.models
    )
    assert result.exit_code == 2
    assert "96" in result.stderr and not (tmp_path / "m.safetensors").exists()


def test_a_pair_without_a_draft_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    only = ["--target", tiny.folder / "target", "--device", "cpu"]
    result = run("calibrate", "--text", tiny.text, "--out", tmp_path / "m.safetensors", *only)
    assert result.exit_code == 2
    assert "draft" in result.stderr.splitlines()[-1]
