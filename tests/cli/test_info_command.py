"""``specattn info``: what is known, and what a pair looks like without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, run

import specattn
from specattn.cli.models import DEFAULT_PAIR
from specattn.geometry import KVGeometry
from specattn.mapping import Mapping
from specattn.pairs import BUILTIN
from specattn.prefill.registry import PREFILLS, parse_prefill
from specattn.selection.registry import METHODS, get_method


def test_pairs_and_methods_with_their_defaults() -> None:
    report = document(run("info", "--json"))
    assert report["pairs"]["qwen2.5-coder"]["draft"] == "qwen2.5-coder-0.5b"
    assert set(report["pairs"]) == set(BUILTIN) and DEFAULT_PAIR in BUILTIN
    assert set(report["methods"]) == set(METHODS)
    for name, options in report["methods"].items():
        assert options == get_method(name).options(), name
    assert set(report["prefills"]) == set(PREFILLS)
    for name, options in report["prefills"].items():
        assert options == parse_prefill(name).options(), name
    assert report["environment"]["specattn"] == specattn.__version__
    assert "pair" not in report and "mapping" not in report


def test_people_read_it_on_stdout() -> None:
    result = run("info")
    for part in ("environment", "qwen2.5-coder-1.5b", "streaming", "budget=0.1", "torch"):
        assert part in result.stdout, part
    assert result.stderr == ""


def test_with_json_only_the_document_is_on_stdout() -> None:
    result = run("info", "--json")
    assert len(result.stdout.splitlines()) == 1 and "streaming" in result.stderr


def test_a_pair_is_described_without_its_weights(tiny: SimpleNamespace, tmp_path: Path) -> None:
    import shutil

    for role in ("target", "draft"):
        shutil.copytree(tiny.folder / role, tmp_path / role, ignore=shutil.ignore_patterns("*.safetensors"))
    models = ["--target", tmp_path / "target", "--draft", tmp_path / "draft", "--dtype", "float32"]
    report = document(run("info", *models, "--mapping", tiny.mapping, "--json"))
    for role in ("target", "draft"):
        model = getattr(tiny.pair, role)
        geometry = KVGeometry.from_config(model.config, model.dtype)
        found = report["pair"][role]
        for field in ("layers", "query_heads", "kv_heads", "head_dim"):
            assert found[field] == getattr(geometry, field), field
        assert found["kv_bytes_per_token"] == geometry.token_bytes
        assert found["parameters"] == model.num_parameters()
        assert found["context_limit"] == model.config.max_position_embeddings
        assert found["dtype"] == "float32"
    mapping = Mapping.load(tiny.mapping)
    assert report["mapping"]["file"] == "mapping.safetensors"
    assert report["mapping"]["layer_map"] == mapping.layer_map.tolist()
    assert report["mapping"]["kl_heads"] == mapping.metadata.kl_heads


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("float32", 4), ("auto", 4)])
def test_kv_bytes_follow_the_dtype(tiny: SimpleNamespace, dtype: str | None, size: int) -> None:
    options = ["--dtype", dtype] if dtype else []
    found = document(run("info", "--target", tiny.folder / "target", *options, "--json"))["pair"]["target"]
    assert found["kv_bytes_per_token"] == 2 * size * found["layers"] * found["kv_heads"] * found["head_dim"]


def test_a_mapping_alone(tiny: SimpleNamespace) -> None:
    result = run("info", "--mapping", tiny.mapping, "--json")
    assert document(result)["mapping"]["metric"] == "kl"
    assert "layer_map" in result.stderr


def test_the_mapping_of_another_pair_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    config = json.loads((tiny.folder / "target" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}), encoding="utf-8")
    tiny.pair.tokenizer.save_pretrained(tmp_path)
    result = run("info", "--target", tmp_path, "--draft", tiny.folder / "draft", "--mapping", tiny.mapping)
    assert result.exit_code == 2
    assert "calibrated for" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--pair nope", "unknown pair 'nope'"),
        ("--draft x", "no target"),
        ("--target ./missing", "does not exist"),
        ("--target ./missing --dtype int3", "int3"),
        ("--mapping missing", "missing"),
    ],
)
def test_refusals(arguments: str, part: str) -> None:
    result = run("info", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and part in result.stderr
