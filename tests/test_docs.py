"""The documentation against the code: examples run, links and paths lead somewhere, commands parse."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import tiny_mapping, tiny_pair

import specattn
from specattn.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in (".", "docs", "docs/methods", "examples")
    for path in sorted((ROOT / folder).glob("*.md"))
}
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# A folder or file of the repository, unless a placeholder follows: tests/selection/test_<name>.py
PATH = re.compile(r"\b(?:src|tests|docs|examples|benchmarks)/[\w./-]*\w(?![\w<])")
MODULE = re.compile(r"`([\w/]+\.py)`")
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)\b(?=[^\n]*`| *#| *$)", re.MULTILINE)
EXAMPLE = "python test"
TEXT = ROOT / "examples" / "carnacki.txt"


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in this language, each at the line where it stands on the page."""
    text, found = PAGES[page], []
    for match in FENCE.finditer(text):
        if match[2].strip() == language:
            found.append("\n" * text.count("\n", 0, match.start(3)) + match[3])
    return found


EXAMPLES = [page for page in PAGES if blocks(page, EXAMPLE)]


def run_examples(page: str) -> dict[str, Any]:
    """Run the examples of a page one after the other, with a small pair and some text to work on."""
    text = TEXT.read_text(encoding="utf-8")[:13_000]
    names: dict[str, Any] = {
        "__name__": "documentation",
        "pair": tiny_pair("qwen2", layers=4, max_positions=4200),
        "texts": [text],
        "prompt": text[:300],
    }
    for block in blocks(page, EXAMPLE):
        exec(compile(block, page, "exec", dont_inherit=True), names)
    return names


def test_there_are_examples() -> None:
    assert {"CONTRIBUTING.md", "docs/mapping.md"} <= set(EXAMPLES)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_examples(page)
    assert 0.1 < names["result"].kv_read_fraction < 1


def test_the_example_method_is_dense_with_a_full_budget() -> None:
    names = run_examples("CONTRIBUTING.md")
    pair, prompt, method = names["pair"], names["prompt"], names["DraftMean"](budget=1.0)
    full = specattn.generate(pair, prompt, method=method, max_new_tokens=32)
    assert full.tokens == specattn.generate(pair, prompt, method="dense", max_new_tokens=32).tokens
    assert full.kv_read_fraction == 1


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in LINK.findall(without_code(page)) if "://" not in link]
    assert [link for link in links if not resolves(page, link)] == []


def without_code(page: str) -> str:
    return FENCE.sub("", PAGES[page])


def resolves(page: str, link: str) -> bool:
    """Whether a relative link names a file, and a heading of it if it has an anchor."""
    name, _, anchor = link.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    return path.exists() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8")))


def anchors(text: str) -> list[str]:
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)]


def test_a_dead_link_is_found() -> None:
    assert resolves("docs/README.md", "mapping.md#the-file")
    assert not resolves("docs/README.md", "mapping.md#no-such-heading")
    assert not resolves("docs/README.md", "no-such-page.md")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.py")}
    roots = (ROOT, ROOT / "src" / "specattn")  # the architecture's paths are relative to the package
    missing = [
        path for path in PATH.findall(PAGES[page]) if not any((root / path).exists() for root in roots)
    ]
    missing += [
        module
        for module in MODULE.findall(PAGES[page])
        if not any(f"/{file}".endswith(f"/{module}") for file in files)
    ]
    assert missing == []


def test_paths_are_found_in_the_pages() -> None:
    assert "src/specattn/errors.py" in PATH.findall(PAGES["CONTRIBUTING.md"])
    assert "selection/base.py" in MODULE.findall(PAGES["docs/architecture.md"])


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall(PAGES["docs/README.md"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - linked == set()


COMMANDS = [
    (page, words)
    for page in PAGES
    if page != "docs/cli.md"  # usage lines, and made from the commands themselves
    for block in blocks(page, "sh")
    for line in block.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))[:1] == ["specattn"]
]


def test_commands_are_found_in_the_pages() -> None:
    assert {"README.md", "docs/mapping.md", "docs/evaluation.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize("page,words", COMMANDS)
def test_commands_parse(page: str, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    context = command.make_context(command.name, rest)
    assert context.command is command


def test_commands_take_as_much_of_the_example_text_as_fits() -> None:
    """The whole book is more than the built-in pair reads."""
    of_it = [words for _, words in COMMANDS if "examples/carnacki.txt" in words and "--prompt-file" in words]
    assert of_it and all("--prompt-tokens" in words for words in of_it)


def test_the_readmes_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    pair = tiny_pair("qwen2", layers=2, max_positions=14_000)
    monkeypatch.setattr(specattn, "load_pair", {"qwen2.5-coder": pair}.__getitem__)
    monkeypatch.setattr(specattn, "generate", partial(specattn.generate, mapping=tiny_mapping(pair)))
    (example,) = blocks("README.md", "python")
    exec(compile(example, "README.md", "exec", dont_inherit=True), {})
    assert re.search(r"^read \d+% of the KV cache$", capsys.readouterr().out, re.MULTILINE)


def test_make_targets_exist() -> None:
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {target for page in PAGES for target in TARGET.findall(PAGES[page])}
    assert {"test", "check", "docs"} <= named
    assert named - set(known) == set()
