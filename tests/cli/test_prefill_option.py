"""``--prefill``: what the commands report of it, and what they refuse before a model is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from command import document, run

import specattn

SPARSE = "sparge:theta=-1:tau=0.3:lam=9"
SPEC = "sparge:theta=-1.0:tau=0.3:lam=9.0"


@pytest.fixture(scope="module")
def prompt(tiny: SimpleNamespace) -> str:
    return tiny.text.read_text(encoding="utf-8")[:400]


def generate(tiny: SimpleNamespace, prompt: str, *arguments: object):
    limit = ["--max-new-tokens", 4, "--method", "dense"]
    return run("generate", prompt, *limit, *arguments, *tiny.models, "--json")


def evaluate(tiny: SimpleNamespace, command: str, *arguments: object):
    sizes = ["--context", 400, "--rows", 20, "--methods", "dense,streaming"]
    return run("eval", command, "--text", tiny.text, *sizes, *arguments, *tiny.models, "--json")


def test_generate_reports_a_sparse_prefill(tiny: SimpleNamespace, prompt: str) -> None:
    result = generate(tiny, prompt, "--prefill", SPARSE)
    report = document(result)
    expected = specattn.generate(tiny.pair, prompt, method="dense", prefill=SPARSE, max_new_tokens=4)
    assert report["tokens"] == expected.tokens
    assert report["prefill"] == SPEC
    assert report["prefill_computed"] == expected.prefill_computed < 1
    assert f"{report['prefill_computed']:.1%}" in result.stderr and SPEC in result.stderr


def test_generate_says_nothing_of_a_dense_one_to_people(tiny: SimpleNamespace, prompt: str) -> None:
    result = generate(tiny, prompt)
    report = document(result)
    assert (report["prefill"], report["prefill_computed"]) == ("dense", 1.0)
    assert "query-key products" not in result.stderr


@pytest.mark.parametrize("command", ["fidelity", "perplexity"])
def test_evaluations_report_it_in_every_result(tiny: SimpleNamespace, command: str) -> None:
    plain, sparse = (evaluate(tiny, command, *options) for options in ([], ["--prefill", SPARSE]))
    for row in document(sparse)["results"]:
        assert row["prefill"] == SPEC and 0 < row["prefill_computed"] < 1
        assert f"{row['prefill_computed']:.1%}" in sparse.stderr
    changes = [
        (one["perplexity"] - other["perplexity"], one["perplexity_dense"] - other["perplexity_dense"])
        for one, other in zip(document(plain)["results"], document(sparse)["results"], strict=True)
    ]
    assert all(change != 0 and reference == 0 for change, reference in changes)
    assert f"dense dense_layers=2 prefill={SPEC}".split()[-1] in sparse.stderr
    assert "prefill" not in plain.stderr


@pytest.mark.parametrize(
    ("prefill", "parts"),
    [
        ("spagre", ["unknown prefill method 'spagre'", "did you mean 'sparge'"]),
        ("sparge:tau=2", ["tau=2.0", "(0, 1]"]),
        ("sparge:tuned=missing.json", ["missing.json", "specattn tune sparge"]),
        ("sparge:p=1", ["no option 'p'"]),
        ("", ["unknown prefill method ''"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_refusals(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, command: str, prefill: str, parts: list[str]
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr("specattn.pairs.load.load_model", load)
    option = ["--prefill", prefill]
    result = generate(tiny, "a", *option) if command == "generate" else evaluate(tiny, "fidelity", *option)
    line = result.stderr.splitlines()[-1]
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert [part for part in parts if part not in line] == []
