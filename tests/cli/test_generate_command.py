"""``specattn generate``: the text, the JSON document, the statistics, and what Ctrl-C leaves."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from command import document, record_progress, run
from generate_case import LIMIT, PROMPT, TOKENS, dense

from specattn.admission import Admission
from specattn.cli.generate import _writer
from specattn.cli.stats import _audit, histogram, panel
from specattn.engine import Engine
from specattn.geometry import KVGeometry

FIELDS = [
    "text",
    "tokens",
    "finish_reason",
    "rounds",
    "accepted_per_round",
    "acceptance_rate",
    "kv_read_fraction",
    "draft_read_fraction",
    "seconds",
    "tokens_per_second",
    "method",
    "environment",
]


@pytest.fixture(scope="module")
def whole(tiny: SimpleNamespace) -> dict[str, Any]:
    """The report of a run that nobody interrupts."""
    return document(run("generate", PROMPT, *LIMIT, "--mapping", tiny.mapping, *tiny.models, "--json"))


def test_the_text_and_nothing_else_goes_to_stdout(generate, tiny: SimpleNamespace) -> None:
    result = generate(PROMPT, "--method", "dense")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == dense(tiny, PROMPT).text + "\n"


def test_the_json_document_is_that_of_the_library(generate, tiny: SimpleNamespace) -> None:
    result = generate(PROMPT, "--method", "dense", "--json")
    report, expected = document(result), dense(tiny, PROMPT)
    assert list(report)[: len(FIELDS)] == FIELDS
    for field in FIELDS[:8]:
        assert report[field] == getattr(expected, field), field
    assert list(report["seconds"]) == ["load", "prefill", "decode"]
    assert all(value > 0 for value in report["seconds"].values())
    assert report["method"] == "dense" and report["kv_read_fraction"] == 1.0
    assert report["prompt_tokens"] == expected.prompt_tokens
    assert report["environment"]["dtype"] == "float32"
    assert 0 < report["memory"]["kv_cache_bytes"] < report["memory"]["peak_bytes"]


def test_json_alone_is_on_stdout(generate) -> None:
    result = generate(PROMPT, "--json")
    assert len(result.stdout.splitlines()) == 1


def test_a_method_with_options_and_a_mapping(generate) -> None:
    report = document(
        generate(
            PROMPT,
            "--method",
            "specattn",
            "-o",
            "p=0.5",
            "--option",
            "window=2",
            "-o",
            "dense_layers=0",
            "--json",
        )
    )
    assert report["method"] == "specattn"
    assert (report["options"]["p"], report["options"]["window"], report["options"]["sink"]) == (0.5, 2, 4)
    assert 0 < report["kv_read_fraction"] < 1


def test_an_audit_is_in_the_panel_and_in_the_document(generate) -> None:
    sparse = ["-o", "p=0.5", "-o", "dense_layers=0", "-o", "window=2"]
    result = generate(PROMPT, *sparse, "--audit", 1, "--json")
    report = document(result)
    found = report["audit"]
    assert found["rate"] == 1 and found["units"] > 0
    assert 0 < found["attention_mass"] < 1 and found["promised_error"] is None
    assert f"{found['units']} heads: {found['attention_mass']:.1%}" in " ".join(result.stderr.split())
    assert document(generate(PROMPT, *sparse, "--json"))["audit"] is None


def test_an_audit_counts_what_is_beyond_a_promise() -> None:
    found = {"queries": 20, "units": 2, "attention_mass": 0.9, "least_mass": 0.5, "output_error": 0.02}
    found |= {"largest_error": 0.3, "read_fraction": 0.01, "promised_error": 0.1, "violations": 0.05}
    assert _audit(found).endswith("read 1.0% more; 5.00% beyond the promised 0.1")
    assert _audit({"queries": 0}) == "no sparse attention was drawn"


def test_statistics_are_shown_on_stderr(generate) -> None:
    result = generate(PROMPT, "--gamma", 3)
    for part in (
        "statistics",
        "acceptance",
        "specattn",
        "p=0.95",
        "KV cache",
        "tokens/s",
        "float32 on cpu",
        "prefill",
    ):
        assert part in result.stderr.replace("accepted", "acceptance"), part
    lengths = re.findall(r"^│ ([0-9]+) [ █]", result.stderr, flags=re.MULTILINE)
    assert lengths == ["0", "1", "2", "3"]


def test_plain_decoding_without_a_draft(tiny: SimpleNamespace) -> None:
    only = ["--target", tiny.folder / "target", "--dtype", "float32", "--device", "cpu"]
    result = run("generate", PROMPT, "--method", "dense", *LIMIT, "--json", *only)
    report = document(result)
    assert set(report["accepted_per_round"]) == {0} and report["gamma"] == 0
    assert "accepted" not in result.stderr


def test_gamma_auto(generate) -> None:
    report = document(generate(PROMPT, "--gamma", "auto", "--json"))
    assert report["gamma"] == "auto" and len(report["tokens"]) == TOKENS


def test_the_fast_path_gives_the_same_document(generate, whole: dict[str, Any]) -> None:
    assert whole["path"]["name"] == "torch" and "need a GPU" in whole["path"]["reason"]
    result = generate(PROMPT, "--fast", "--json")
    report = document(result)
    assert report["path"] == {"name": "fast", "reason": None}
    assert "path" in result.stderr
    for field in ("text", "tokens", "accepted_per_round"):
        assert report[field] == whole[field], field


def test_what_has_no_fast_path_is_refused_by_name(generate) -> None:
    result = generate(PROMPT, "--method", "oracle", "--fast", mapping=False)
    assert result.exit_code == 2
    assert "no fast path yet" in result.stderr


def test_what_was_chosen_and_why(generate, whole: dict[str, Any]) -> None:
    assert whole["plans"]["rounds"] == {"sparse, gamma 4": whole["rounds"]}
    assert whole["plans"]["reason"] is None
    result = generate(PROMPT, "--fallback", "--json")
    report = document(result)
    assert sum(report["plans"]["rounds"].values()) == report["rounds"]
    assert report["plans"]["reason"].count(" ms") == 3
    assert "choice" in result.stderr


def test_sampling_depends_on_the_seed_alone(generate) -> None:
    texts = [generate(PROMPT, "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_of_one_is_greedy(generate, whole: dict[str, Any]) -> None:
    assert document(generate(PROMPT, "--temperature", 2, "--top-k", 1, "--json"))["tokens"] == whole["tokens"]


def test_a_stop_string_ends_the_text(generate, whole: dict[str, Any]) -> None:
    text = whole["text"]
    report = document(generate(PROMPT, "--stop", "~~", "--stop", text[5:8], "--json"))
    assert report["finish_reason"] == "stop"
    assert report["text"] == text[: text.index(text[5:8])]


def test_both_models_show_their_prefill(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.generate")
    count = document(generate(PROMPT, "--json"))["prompt_tokens"]
    assert shown == {"target prefill": [count, count], "draft prefill": [count, count]}


def test_with_json_the_text_is_shown_to_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, expected in ((True, "book"), (False, "")):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        _writer(json=True)("book")
        assert screen.getvalue() == expected


def test_the_context_ends_the_generation_and_bounds_the_cache(generate, tiny: SimpleNamespace) -> None:
    limit = tiny.pair.context_limit
    prompt = "look " * (limit // 5) + "!" * (limit % 5)
    report = document(generate(prompt[:-6], "--max-new-tokens", 10**7, "--json"))
    assert (report["finish_reason"], len(report["tokens"])) == ("length", 6)
    a_token = sum(KVGeometry.from_config(model.config, model.dtype).token_bytes for model in tiny.pair.models)
    assert report["memory"]["kv_cache_bytes"] < 1.2 * limit * a_token


def test_lossless_prints_the_dense_text_and_what_it_cost(generate, tiny: SimpleNamespace) -> None:
    arguments = [PROMPT, "--method", "streaming", "-o", "budget=0.4", "--lossless", "--lossless-every", "5"]
    result = generate(*arguments)
    assert result.stdout == dense(tiny, PROMPT).text + "\n"
    assert "dense passes" in result.stderr and "full KV reads a token" in " ".join(result.stderr.split())
    report = document(generate(*arguments, "--json"))
    figures = report["lossless"]
    assert report["tokens"] == dense(tiny, PROMPT).tokens
    assert figures["dense_reads_per_token"] == figures["dense_passes"] / (TOKENS - 1)
    assert figures["acceptance_rate"] == figures["accepted"] / figures["proposed"]
    assert len(report["accepted_per_round"]) == report["rounds"] >= figures["dense_passes"]


# Ctrl-C


def interrupt(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    """Ctrl-C in the middle of the round after ``rounds`` rounds."""
    original, done = Engine._round, []

    def advance(self: Engine):
        done.append(None)
        if len(done) > rounds:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Engine, "_round", advance)


def test_an_interruption_keeps_text_and_statistics(
    generate, whole: dict[str, Any], tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 1 + sum(accepted + 1 for accepted in whole["accepted_per_round"][:2])
    text = tiny.pair.tokenizer.decode(whole["tokens"][:count], skip_special_tokens=True)
    assert 0 < len(text) < len(whole["text"])
    interrupt(monkeypatch, rounds=2)
    # The last character is held back, because it may begin the stop string.
    result = generate(PROMPT, "--stop", text[-1] + "~~")
    assert (result.exit_code, result.stdout) == (130, text + "\n")
    assert "(interrupted)" in result.stderr and "accepted in a round" in result.stderr


def test_an_interruption_keeps_the_json_document(
    generate, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, rounds=2)
    result = generate(PROMPT, "--json")
    report = document(result)
    assert result.exit_code == 130
    assert (report["finish_reason"], report["rounds"]) == ("interrupted", 2)
    assert report["tokens"] == whole["tokens"][: len(report["tokens"])]
    assert report["accepted_per_round"] == whole["accepted_per_round"][:2]


def test_an_interruption_of_the_prefill_has_no_text(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Admission, active: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Admission, "read", read)
    result = generate(PROMPT, "--json")
    report = document(result)
    assert result.exit_code == 130
    assert (report["text"], report["tokens"], report["finish_reason"]) == ("", [], "interrupted")
    assert report["seconds"]["prefill"] == 0


def test_a_failed_prefill_is_a_failed_run(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Admission, active: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(Admission, "read", read)
    result = generate(PROMPT)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: the device is on fire"


# Statistics


def test_the_histogram_counts_every_accepted_length() -> None:
    rows = histogram([0, 4, 4, 4, 1, 4], 4)
    assert [(length, rounds) for length, rounds, _ in rows] == [(0, 1), (1, 1), (2, 0), (3, 0), (4, 4)]
    bars = [len(bar) for *_, bar in rows]
    assert bars[2] == bars[3] == 0 and bars[4] == 4 * bars[0] == 4 * bars[1]


def test_the_panel_of_a_run_without_rounds(generate) -> None:
    report = document(generate(PROMPT, "--max-new-tokens", 1, "--json"))
    assert report["rounds"] == 0 and len(report["tokens"]) == 1
    assert panel(json.loads(json.dumps(report))).title == "statistics"
