"""``specattn eval``: the results, kept whatever happens, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import document, record_progress, run

import specattn.evaluation.fidelity
from specattn.cli.docs import markdown
from specattn.evaluation.decoding import Decoding
from specattn.evaluation.documents import load_documents
from specattn.evaluation.fidelity import FidelityResult, evaluate
from specattn.evaluation.summary import means
from specattn.mapping import Mapping
from specattn.selection.registry import parse_method

METHODS = "specattn:p=0.6:dense_layers=0,streaming:budget=0.2,streaming:budget=0.5"
FIGURES = [
    "kl",
    "total_variation",
    "top1_agreement",
    "perplexity",
    "perplexity_dense",
    "attention_mass",
    "kv_read_fraction",
    "draft_read_fraction",
]
PREFILL = ["prefill", "prefill_computed"]


@pytest.fixture
def second(tiny: SimpleNamespace, tmp_path: Path) -> Path:
    path = tmp_path / "second.txt"
    path.write_text(tiny.text.read_text(encoding="utf-8")[123:], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluation(tiny: SimpleNamespace):
    def call(command: str, *arguments: object, methods: str = METHODS):
        files = ["--text", tiny.text, "--mapping", tiny.mapping, *tiny.models]
        return run("eval", command, *files, "--methods", methods, "--context", 60, *arguments)

    return call


@pytest.fixture(scope="module")
def whole(evaluation) -> dict[str, Any]:
    """The report of a run that nobody interrupts."""
    return document(evaluation("fidelity", "--rows", 10, "--json"))


def test_fidelity_is_that_of_the_library(evaluation, tiny: SimpleNamespace, second: Path) -> None:
    report = document(evaluation("fidelity", "--text", second, "--rows", 10, "--gamma", 3, "--json"))
    assert list(report)[:6] == ["pair", "context", "rows", "gamma", "documents", "results"]
    assert (report["context"], report["rows"], report["gamma"]) == (60, 10, 3)
    assert report["documents"] == ["book", "second"] and report["without_results"] == []
    assert report["complete"] is True
    documents = load_documents([tiny.text, second], tiny.pair.tokenizer, 61)
    methods = [parse_method(method) for method in METHODS.split(",")]
    mapping = Mapping.load(tiny.mapping)
    expected = list(evaluate(tiny.pair, documents, methods, context=60, rows=10, gamma=3, mapping=mapping))
    assert len(report["results"]) == len(expected) == 6
    for found, result in zip(report["results"], expected, strict=True):
        assert list(found) == ["method", "options", "document", *FIGURES, *PREFILL]
        assert (found["prefill"], found["prefill_computed"]) == ("dense", 1.0)
        assert (found["method"], found["document"]) == (result.method, result.document)
        assert found["options"] == result.options
        assert [found[name] for name in FIGURES] == pytest.approx([getattr(result, name) for name in FIGURES])


def test_perplexity_has_the_papers_protocol(tiny: SimpleNamespace, evaluation) -> None:
    report = document(evaluation("perplexity", "--json"))
    assert (report["context"], report["rows"]) == (60, 54)
    assert list(report["results"][0]) == [
        "method",
        "options",
        "document",
        "perplexity",
        "perplexity_dense",
        "kv_read_fraction",
        "draft_read_fraction",
        *PREFILL,
    ]


def test_the_defaults_are_the_papers() -> None:
    from specattn.cli.evaluate import PerplexityProtocol

    paper, long = PerplexityProtocol.PAPER, PerplexityProtocol.LONG
    assert (paper.context, paper.rows(2048), paper.rows(60)) == (2048, 1843, 54)
    assert (long.context, long.rows(long.context)) == (16384, 1020)
    default = markdown().split("## specattn eval perplexity")[1].split("\n## ")[0]
    assert "[default: paper]" in default


def test_perplexity_at_the_end_of_a_long_context(tiny: SimpleNamespace, evaluation) -> None:
    options = ["--protocol", "long", "--rows", 20, "--json"]
    report = document(evaluation("perplexity", *options, methods="streaming"))
    assert (report["context"], report["rows"]) == (60, 20)
    short = evaluation("perplexity", "--protocol", "long", methods="streaming")
    assert short.exit_code == 2 and "--rows 1020 must be below --context 60" in short.stderr


def test_intervals_are_over_documents_or_rounds(evaluation, tiny: SimpleNamespace, second: Path) -> None:
    one = document(evaluation("fidelity", "--rows", 10, "--json", methods="streaming,dense"))
    for label, ends in one["intervals"].items():
        (row,) = [row for row in one["results"] if label.startswith(row["method"])]
        low, high = ends["kl"]
        assert low <= row["kl"] + 1e-12 and row["kl"] - 1e-12 <= high
        assert (low < high) == (row["method"] == "streaming")
    result = evaluation("fidelity", "--rows", 10, "--text", second, "--json", methods="streaming")
    both = document(result)
    low, high = both["intervals"]["streaming budget=0.1"]["kl"]
    assert [low, high] == pytest.approx(sorted(row["kl"] for row in both["results"]))
    assert f"{low:.4f} to {high:.4f}" in result.stderr
    change = document(evaluation("perplexity", "--json", methods="streaming"))["intervals"]
    assert list(change["streaming budget=0.1"]) == ["change"]


def test_the_breakdown_is_by_layer_and_head(evaluation) -> None:
    methods = "specattn:p=0.6:dense_layers=1,snapkv:budget=0.4,dense"
    plain = document(evaluation("fidelity", "--rows", 10, "--json", methods=methods))
    report = document(evaluation("fidelity", "--rows", 10, "--breakdown", "--json", methods=methods))
    assert not any("breakdown" in row for row in plain["results"])
    for row, same in zip(report["results"], plain["results"], strict=True):
        found = row.pop("breakdown")
        assert row == same
        layers = {"specattn": [1, 2], "snapkv": [0, 1, 2], "dense": []}[row["method"]]
        assert found["layers"] == layers
        cells = [mass for layer in found["mass"] for mass in layer]
        assert len(cells) == 2 * len(layers)
        if layers:
            assert sum(cells) / len(cells) == pytest.approx(row["attention_mass"])
            shares = [share for layer in found["density"] for share in layer]
            assert all(0 < share < 1 for share in shares) and len(shares) == len(cells)


def test_perplexity_shows_the_change_and_what_was_not_read(evaluation) -> None:
    result = evaluation("perplexity", "--json", methods="streaming:budget=0.2:dense_layers=0")
    (row,) = document(result)["results"]
    assert f"{row['perplexity'] / row['perplexity_dense'] - 1:+.2%}" in result.stderr
    assert f"{1 - row['kv_read_fraction']:.1%}" in result.stderr
    assert "streaming dense_layers=0 budget=0.2" in result.stderr


def test_fidelity_shows_a_row_a_method(evaluation) -> None:
    result = evaluation("fidelity", "--rows", 10)
    assert result.exit_code == 0 and result.stdout == ""
    for method in ("specattn dense_layers=0 p=0.6", "streaming budget=0.2", "streaming budget=0.5"):
        assert method in result.stderr
    assert "book" not in result.stderr


@pytest.mark.parametrize("extra", ["verbose", "second"])
def test_documents_have_their_own_rows_if_there_are_several_or_they_are_asked_for(
    evaluation, second: Path, extra: str
) -> None:
    options = ["--verbose"] if extra == "verbose" else ["--text", second]
    result = evaluation("fidelity", "--rows", 10, *options, "--json", methods="streaming")
    assert "mean" in result.stderr and "book" in result.stderr
    assert ("second" in result.stderr) == (extra == "second")
    for row in document(result)["results"]:
        assert f"{row['kl']:.4f}" in result.stderr


def test_the_mean_is_that_of_the_summary(evaluation, tiny: SimpleNamespace, second: Path) -> None:
    result = evaluation("fidelity", "--rows", 10, "--text", second, methods="streaming")
    documents = load_documents([tiny.text, second], tiny.pair.tokenizer, 61)
    expected = means(list(evaluate(tiny.pair, documents, [parse_method("streaming")], context=60, rows=10)))
    (line,) = [line for line in result.stderr.splitlines() if "streaming" in line]
    assert f"{expected['streaming budget=0.1']['kl']:.4f}" in line


def test_progress_has_the_right_totals(evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.evaluate")
    assert evaluation("fidelity", "--rows", 10, methods="specattn,streaming").exit_code == 0
    assert shown == {
        "book: target prefill": [50, 50],
        "book: draft prefill": [50, 50],
        "book: dense reference": [10, 10],
        "book: specattn": [10, 10],
        "book: streaming": [10, 10],
    }


def test_a_plot_of_the_frontier(evaluation, tmp_path: Path) -> None:
    plot = tmp_path / "frontier.png"
    assert evaluation("fidelity", "--rows", 10, "--plot", plot).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


# What happens on the way


def stop(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """``error`` when ``after`` results are there."""

    def interrupted(*arguments, **options):
        for number, result in enumerate(evaluate(*arguments, **options)):
            if number == after:
                raise error
            yield result

    monkeypatch.setattr(specattn.evaluation.fidelity, "evaluate", interrupted)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("lost"), 1)])
@pytest.mark.parametrize("after", [0, 2])
def test_results_survive(
    evaluation,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    code: int,
    after: int,
) -> None:
    stop(monkeypatch, error, after)
    plot = tmp_path / "frontier.png"
    result = evaluation("fidelity", "--rows", 10, "--json", "--plot", plot)
    assert result.exit_code == code
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["complete"] is False
    assert report["results"] == whole["results"][:after]
    assert ("streaming budget=0.2" in result.stderr) == plot.exists() == (after > 0)


def test_results_survive_a_lack_of_memory(
    evaluation, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoding.run

    def full(self: Decoding) -> list[FidelityResult]:
        if self.method.name == "streaming":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return decode(self)

    monkeypatch.setattr(Decoding, "run", full)
    result = evaluation("fidelity", "--rows", 10, "--json")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "--rows" in line and "--debug" not in line
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["complete"] is False and report["results"] == whole["results"][:1]


def test_documents_without_results_are_named_apart(
    evaluation, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(monkeypatch, KeyboardInterrupt(), 2)
    options = ["--rows", 10, "--text", second, "--batch", 1, "--json"]
    report = document(evaluation("fidelity", *options))
    assert report["documents"] == ["book"] == [*{row["document"] for row in report["results"]}]
    assert report["without_results"] == ["second"]


def test_a_figure_that_json_cannot_say_is_null(evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def infinite(*arguments, **options):
        for result in evaluate(*arguments, **options):
            yield replace(result, perplexity=float("inf"), kl=float("nan"))

    monkeypatch.setattr(specattn.evaluation.fidelity, "evaluate", infinite)
    (row,) = document(evaluation("fidelity", "--rows", 10, "--json", methods="streaming"))["results"]
    assert (row["perplexity"], row["kl"]) == (None, None)
    assert row["perplexity_dense"] > 1


# Refusals


@pytest.mark.parametrize(
    ("arguments", "methods", "parts"),
    [
        (["--rows", 60], METHODS, ["--rows 60", "--context 60"]),
        (["--rows", 10, "--context", 100_000], METHODS, ["context=100,000", "shorter"]),
        (["--rows", 10, "--text", "{short}"], METHODS, ["short.txt", "15 tokens", "61 are needed"]),
        (["--rows", 10, "--text", "{twin}"], METHODS, ["'book'", "rename"]),
        (["--rows", 10, "--text", "missing.txt"], METHODS, ["missing.txt"]),
        (["--rows", 10, "--plot", "nowhere/plot.png"], METHODS, ["nowhere"]),
        (["--rows", 10], "", ["--methods"]),
        (["--rows", 10], "specatn:p=0.9", ["did you mean 'specattn'"]),
        (["--rows", 10], "specattn:p=0.9,streaming:budgets=1", ["budgets", "did you mean 'budget'"]),
        (["--rows", 10], "specattn:p=2", ["p=2", "(0, 1]"]),
        (["--rows", 10, "--mapping", "missing.safetensors"], METHODS, ["missing.safetensors", "calibrate"]),
    ],
)
def test_refusals(evaluation, tmp_path: Path, arguments: list, methods: str, parts: list[str]) -> None:
    (tmp_path / "short.txt").write_text("the draft reads", encoding="utf-8")
    (tmp_path / "book.txt").write_text("the draft reads", encoding="utf-8")
    names = {"short": tmp_path / "short.txt", "twin": tmp_path / "book.txt"}
    filled = [str(argument).format(**names) for argument in arguments]
    result = evaluation("fidelity", "--json", *filled, methods=methods)
    line = result.stderr.splitlines()[-1]
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert line.startswith("error: ")
    assert [part for part in parts if part not in line] == []
