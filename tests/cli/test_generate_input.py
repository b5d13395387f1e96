"""``specattn generate``: where its prompt comes from, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import refused, run
from generate_case import LIMIT, PROMPT, dense
from tiny import EOS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import specattn
from specattn.cli.prompt import encode


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


# Refusals


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
