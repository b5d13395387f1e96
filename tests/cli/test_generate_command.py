"""``specattn generate``: the text, the JSON document, the statistics, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import document, record_progress, run
from tiny import EOS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import specattn
from specattn.admission import Admission
from specattn.cli.generate import _writer
from specattn.cli.prompt import encode
from specattn.cli.stats import _audit, histogram, panel
from specattn.engine import Engine
from specattn.geometry import KVGeometry

PROMPT = "the draft reads a long book"
TOKENS = 14
LIMIT = ["--max-new-tokens", TOKENS]
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


@pytest.fixture
def generate(tiny: SimpleNamespace):
    """Generate with the tiny pair; its mapping is named unless ``mapping`` is false."""

    def call(*arguments: object, mapping: bool = True, **options):
        named = ["--mapping", tiny.mapping] if mapping else []
        return run("generate", *LIMIT, *arguments, *named, *tiny.models, **options)

    return call


def dense(tiny: SimpleNamespace, prompt: str) -> specattn.GenerationResult:
    """The same through the library."""
    return specattn.generate(tiny.pair, prompt, method="dense", max_new_tokens=TOKENS)


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


# The prompt


def test_a_document_comes_before_the_question(generate, tiny: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("a long book\n\n", encoding="utf-8")
    both = generate("where to look?", "--prompt-file", file, "--method", "dense")
    assert both.stdout == dense(tiny, "a long book\n\nwhere to look?").text + "\n"
    alone = generate("--prompt-file", file, "--method", "dense")
    assert alone.stdout == dense(tiny, "a long book").text + "\n"


def test_the_prompt_may_come_from_standard_input(generate, tiny: SimpleNamespace) -> None:
    result = generate("--prompt-file", "-", "--method", "dense", input="a long book")
    assert result.stdout == dense(tiny, "a long book").text + "\n"


def test_only_the_first_tokens_of_a_document_are_read(
    generate, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("a long book about nothing", encoding="utf-8")
    result = generate("why?", "--prompt-file", file, "--prompt-tokens", "6", "--method", "dense")
    assert result.stdout == dense(tiny, "a long\n\nwhy?").text + "\n"
    refused(generate("why?", "--prompt-tokens", "6"), "--prompt-tokens 6", "--prompt-file")


def test_a_chat_template_wraps_the_prompt(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.pair.tokenizer
    template = "{% for m in messages %}the {{ m['role'] }} reads {{ m['content'] }} round{% endfor %}"
    for role in ("target", "draft"):
        getattr(tiny.pair, role).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        (tmp_path / role / "chat_template.jinja").write_text(template, encoding="utf-8")
    models = [
        "--target",
        tmp_path / "target",
        "--draft",
        tmp_path / "draft",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    result = run("generate", "a book", "--chat", "--method", "dense", *LIMIT, *models)
    assert result.stdout == dense(tiny, "the user reads a book round").text + "\n"


def test_a_chat_template_brings_its_own_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    begin = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = "<eos>{{ messages[0]['content'] }}"
    pair = SimpleNamespace(tokenizer=tokenizer, name="tiny")
    plain = encode(pair, "book", chat=False)
    assert plain[0] == EOS and EOS not in plain[1:]
    assert encode(pair, "book", chat=True) == plain


def test_chat_without_a_template_is_refused(generate, tiny: SimpleNamespace) -> None:
    assert tiny.pair.tokenizer.chat_template is None
    refused(generate(PROMPT, "--chat"), "chat template", "--chat")


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


# Refusals


def refused(result, *parts: str, code: int = 2) -> None:
    """The run ended with one line ``error: ...`` that says these things, and nothing on stdout."""
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == code, result.stderr
    assert line.startswith("error: ") and result.stdout == ""
    assert [part for part in parts if part not in line] == []
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--method specatn", ["specatn", "did you mean 'specattn'", "streaming"]),
        ("--method specattn -o sinks=3", ["sinks", "did you mean 'sink'", "window"]),
        ("--method specattn -o p", ["'p'", "option=value"]),
        ("--method specattn -o p=often", ["p='often'", "float"]),
        ("--method specattn -o p=0", ["p=0", "(0, 1]"]),
        ("--method specattn -o p=1.01", ["p=1.01", "(0, 1]"]),
        ("--method streaming -o budget=-1", ["budget=-1"]),
        ("--audit 2", ["audit=2.0", "[0, 1]"]),
        ("--audit 0.1 --method snapkv", ["'snapkv' drops it"]),
        ("--method specattn -o centroids=63", ["centroids=63", "centroids=64"]),
        ("--method specattn -o refresh=4", ["refresh=4", "signals=both"]),
        ("--gamma 0", ["gamma=0", "at least 1", "auto"]),
        ("--gamma -2", ["gamma=-2"]),
        ("--gamma some", ["gamma='some'"]),
        ("--lossless --method dense", ["'dense'", "lossless already"]),
        ("--lossless --method h2o", ["'h2o'", "drops tokens for good"]),
        ("--lossless --lossless-every 0", ["lossless_every=0", "at least 1", "auto"]),
        ("--lossless-every 8", ["lossless_every=8", "no effect"]),
        ("--temperature -1", ["temperature = -1"]),
        ("--top-p 1.5", ["top_p = 1.5", "(0, 1]"]),
        ("--mapping missing.safetensors", ["missing.safetensors", "specattn calibrate"]),
        ("--mapping pyproject.toml", ["pyproject.toml", "not a mapping"]),
        ("--prompt-file missing.txt", ["missing.txt", "check the path"]),
        ("--prompt-file tests", ["tests", "directory"]),
        ("--pair qwen2.5-code", ["qwen2.5-code", "'qwen2.5-coder'"]),
        ("--pair qwen2.5-coder --target x", ["qwen2.5-coder", "target"]),
        ("--draft x", ["target"]),
        ("--target ./missing", ["./missing", "does not exist"]),
        ("--device cuda:77", ["cuda:77", "CUDA device(s)"]),
        ("--device tpus", ["tpus", "cuda"]),
        ("--dtype int3", ["int3", "bfloat16"]),
    ],
)
def test_wrong_input_is_refused_before_any_model_is_read(
    arguments: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr("specattn.pairs.load.open_source", load)
    monkeypatch.setattr("specattn.pairs.load.load_model", load)
    monkeypatch.chdir(Path(__file__).parents[2])
    refused(run("generate", PROMPT, *arguments.split()), *parts)


@pytest.mark.parametrize(
    ("prompt", "part"),
    [("", "empty"), (" \n", "empty"), ("nothing\0here", "zero bytes"), ("caf\udce9", "not UTF-8")],
)
def test_a_prompt_that_is_empty_or_no_text_is_refused(prompt: str, part: str) -> None:
    refused(run("generate", prompt), part)


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "empty"), (b"\n\t ", "empty"), (b"\x7fELF\0\0", "zero bytes"), (b"caf\xe9", "not UTF-8")],
)
def test_a_file_that_is_empty_or_no_text_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    refused(run("generate", "--prompt-file", file), part, "prompt.txt")
    refused(run("generate", "--prompt-file", "-", input=content), part, "standard input")


def test_no_prompt_at_all_is_refused() -> None:
    refused(run("generate"), "PROMPT", "--prompt-file")


def test_a_method_that_needs_a_mapping_says_how_to_make_one(generate) -> None:
    refused(generate(PROMPT, mapping=False), "specattn calibrate", "--mapping")


def test_a_method_that_needs_a_draft_says_so(tiny: SimpleNamespace) -> None:
    refused(run("generate", PROMPT, "--target", tiny.folder / "target", "--device", "cpu"), "--draft")


def test_the_mapping_of_another_pair_is_refused(generate, tiny: SimpleNamespace, tmp_path: Path) -> None:
    from dataclasses import replace

    mapping = specattn.Mapping.load(tiny.mapping)
    other = replace(mapping, metadata=replace(mapping.metadata, target="another/model", target_hash="0" * 64))
    other.save(tmp_path / "other.safetensors")
    refused(
        generate(PROMPT, "--mapping", tmp_path / "other.safetensors", mapping=False),
        "another/model",
        "calibrate",
    )


def test_a_prompt_beyond_the_context_is_refused(generate, tiny: SimpleNamespace, tmp_path: Path) -> None:
    limit = tiny.pair.context_limit
    file = tmp_path / "long.txt"
    file.write_text("look " * limit, encoding="utf-8")
    refused(generate("--prompt-file", file), f"{limit:,}", "shorten the prompt")


def test_an_empty_stop_string_is_refused(generate) -> None:
    refused(generate(PROMPT, "--stop", ""), "stop string")


def test_no_room_for_the_cache_is_a_failed_run(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specattn.cache.available_bytes", lambda device: 1000)
    refused(generate(PROMPT), "KV cache", "1000 B", code=1)


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
