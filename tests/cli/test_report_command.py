"""``specattn report``: a page that needs nothing but itself, and refusals that name the file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
from command import document, run

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "fidelity_8192_methods_h200.json"
EMPTY_TAGS = {"meta", "link", "br", "img"}


class Checker(HTMLParser):
    """Fails if a tag is not closed, and keeps every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_of_published_results(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("report", RESULT, "--out", out, "--markdown", "--title", "Methods & reads")
    assert result.exit_code == 0, result.stderr
    page = out.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(address.startswith("#") for address in checker.addresses)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "<h1>Methods &amp; reads</h1>" in page and "prefers-color-scheme: dark" in page
    markdown = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| twilight base=specattn p=0.95 |" in markdown.replace("**", "")
    assert "<svg" in page and "<svg" not in markdown


def test_the_document_has_the_figures_of_each_method(tmp_path: Path) -> None:
    given = json.loads(RESULT.read_text(encoding="utf-8"))
    found = document(run("report", RESULT, "--out", tmp_path / "page.html", "--json"))
    assert found["page"] == str(tmp_path / "page.html") and found["tasks"] == []
    assert found["sources"][0]["kind"] == "fidelity" and "H200" in found["sources"][0]["environment"]
    (evaluation,) = found["evaluations"]
    assert {name: evaluation[name] for name in ("pair", "context", "rows", "gamma", "documents")} == {
        name: given[name] for name in ("pair", "context", "rows", "gamma", "documents")
    }
    rows = [row["kl"] for row in given["results"] if row["method"] == "dense"]
    assert evaluation["methods"]["dense"]["kl"] == pytest.approx(fmean(rows))
    assert evaluation["complete"] is True and "dense" in evaluation["intervals"]


def test_names_of_files_cannot_bring_markup_in(tmp_path: Path) -> None:
    run_file = tmp_path / "<script>alert(1)<script>.json"
    shutil.copy(RESULT, run_file)
    assert run("report", run_file, "--out", tmp_path / "page.html").exit_code == 0
    assert "alert(1)<" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no JavaScript here")
def test_the_script_is_javascript() -> None:
    script = ROOT / "src" / "specattn" / "report" / "assets" / "sort.js"
    assert subprocess.run(["node", "--check", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no run that a report can show"),
        ("[1]", "is JSON but no object"),
        ('{\n"results": [\n', "in line 3"),
        ('{"results": [], "pair": "x", "context": 1, "rows": 1, "gamma": 1}', "holds no results"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    result = run("report", tmp_path / "run.json", "--out", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "run.json" in result.stderr and message in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_refusals(tmp_path: Path) -> None:
    for arguments, message in [
        ((), "no run was given"),
        ((tmp_path / "absent.json",), "No such file"),
        ((tmp_path / "absent.safetensors",), "absent.safetensors"),
        ((RESULT, "--out", tmp_path / "absent" / "page.html"), "does not exist"),
        ((RESULT, "--out", tmp_path / "page.md", "--markdown"), "--out"),
    ]:
        result = run("report", *arguments)
        assert result.exit_code == 2 and message in result.stderr, arguments
