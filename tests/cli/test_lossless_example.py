"""``examples/lossless_reads.py`` on a tiny pair: its figures are those of the library."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script

import specattn

EXAMPLE = Path(__file__).parents[2] / "examples" / "lossless_reads.py"


def load_example():
    return load_script("examples/lossless_reads.py")


def words(tiny: SimpleNamespace, file: Path) -> list[str]:
    """A run of three methods beside dense speculation."""
    sizes = ["--prompts", 3, "--least", 20, "--most", 70, "--max-new-tokens", 16]
    methods = ["--methods", "specattn:p=0.9,streaming:budget=0.7", "--alone", "self:p=0.9"]
    files = ["--text", tiny.text, "--mapping", tiny.mapping, "--out", file]
    return [str(word) for word in (*files, *sizes, *methods, *tiny.models)]


def test_lossless_equals_dense_and_reads_are_counted(tiny: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "reads.json"
    report = load_example().main(words(tiny, file))
    assert json.loads(file.read_text()) == report and report["complete"] is True
    dense, *lossless = report["results"]
    assert [(row["method"], row["draft"]) for row in report["results"]] == [
        ("dense", True),
        ("specattn:p=0.9", True),
        ("streaming:budget=0.7", True),
        ("self:p=0.9", False),
    ]
    assert [prompt["prompt_tokens"] for prompt in dense["prompts"]] == [20, 37, 70]
    assert all(row["equal"] == 1 and row["largest_gap"] < 1e-4 for row in report["results"])
    assert all(
        row["tokens_per_second"] > 0 and row["path"].startswith("torch: ") for row in report["results"]
    )
    for row in lossless:
        for prompt in row["prompts"]:
            assert prompt["dense_reads_per_token"] == prompt["dense_passes"] / 15
            assert prompt["first_difference"] is None


@pytest.mark.parametrize("after", [1, 3])
def test_an_interruption_keeps_the_methods_that_are_done(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    example, file, done = load_example(), tmp_path / "reads.json", []

    def run(pair, prompts, options, reference):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append({"method": options["method"]})
        return done[-1], [[1]] * len(prompts)

    monkeypatch.setattr(example, "run", run)
    with pytest.raises(KeyboardInterrupt):
        example.main(words(tiny, file))
    report = json.loads(file.read_text())
    assert report["results"] == done and len(done) == after
    assert report["complete"] is False


def test_a_token_that_is_not_the_dense_choice_has_a_gap(tiny: SimpleNamespace) -> None:
    gaps = load_example().gaps
    prompt = tiny.pair.tokenizer("a long book")["input_ids"]
    tokens = specattn.generate(tiny.pair, [prompt], method="dense", max_new_tokens=6)[0].tokens
    other = [*tokens[:3], (tokens[3] + 1) % 90, *tokens[4:]]
    with torch.inference_mode():
        logits = tiny.pair.target(torch.tensor([prompt + tokens[:3]])).logits[0, -1]
    found = gaps(tiny.pair, prompt, other)
    assert max(gaps(tiny.pair, prompt, tokens)) < 1e-5 and max(found[:3]) < 1e-5
    assert found[3] == pytest.approx(float(logits.max() - logits[other[3]]), abs=1e-4)
