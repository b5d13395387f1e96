"""``specattn eval passkey`` and the other tasks: what they print, keep, resume and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import document, record_progress, run

from specattn.cli.tasks.options import RunOptions
from specattn.evaluation.tasks.run_folder import RunFolder

METHODS = "dense,streaming:budget=0.3"
PASSKEY = ["--length", 400, "--length", 500, "--samples", 2]


@pytest.fixture
def ask(tiny: SimpleNamespace, tmp_path: Path):
    def call(task: str, *arguments: object, folder: str = "run", methods: str = METHODS):
        files = ["--run", tmp_path / folder, *tiny.models]
        return run("eval", task, *files, "--methods", methods, *arguments)

    return call


def test_passkey_reports_every_method(ask, tmp_path: Path) -> None:
    result = ask("passkey", *PASSKEY, "--gamma", 3, "--json")
    report = document(result)
    assert report["run"] == str(tmp_path / "run") and report["task"] == "passkey"
    assert list(report["methods"]) == ["dense", "streaming:budget=0.3"]
    for method, figures in report["methods"].items():
        assert figures["samples"] == 4 and figures["complete"]
        assert list(figures["groups"]) == ["400", "500"]
        assert method in result.stderr and f"{figures['kv_read_fraction']:.1%}" in result.stderr
    assert report["methods"]["dense"]["kv_read_fraction"] == 1
    against = report["methods"]["streaming:budget=0.3"]["against_dense"]
    assert against["samples"] == 4 and f"{against['difference']:+.1%}" in result.stderr
    assert report["environments"] == json.loads((tmp_path / "run" / "environment.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == report["config"] | {"kind": "specattn run", "version": 1}
    assert config["options"] == {"length": [400, 500], "samples_each": 2, "digits": 5, "seed": 0}
    assert config["engine"] == {"gamma": 3, "prefill": "dense"}


def test_lossless_answers_are_those_of_the_dense_target(ask, tmp_path: Path) -> None:
    ask("passkey", *PASSKEY, methods="dense,streaming:budget=0.3", folder="plain")
    report = document(
        ask("passkey", *PASSKEY, "--lossless", "--json", methods="streaming:budget=0.3", folder="lossless")
    )
    assert report["config"]["engine"]["lossless"] is True
    dense, sparse, lossless = (
        [json.loads(line)["output"] for line in next(tmp_path.glob(pattern)).open()]
        for pattern in ("plain/samples-dense*", "plain/samples-streaming*", "lossless/samples-*")
    )
    assert sorted(lossless) == sorted(dense) != sorted(sparse)
    assert report["methods"]["streaming:budget=0.3"]["kv_read_fraction"] < 1


def test_the_same_command_goes_on_and_another_is_refused(ask) -> None:
    first = document(ask("passkey", *PASSKEY, "--json"))
    assert document(ask("passkey", *PASSKEY, "--json")) == first
    for changed in (["--gamma", 2], ["--seed", 1], ["--prefill", "sparge:tau=0.5"]):
        result = ask("passkey", *PASSKEY, *changed)
        assert result.exit_code == 2 and "choose a new folder" in result.stderr


def test_ctrl_c_keeps_the_answers(ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = document(ask("passkey", *PASSKEY, "--json", folder="whole"))
    append, calls = RunFolder.append, []

    def interrupted(self, method, answer):
        append(self, method, answer)
        calls.append(answer.id)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", interrupted)
        assert ask("passkey", *PASSKEY).exit_code == 130
    kept = RunFolder(tmp_path / "run").answers("dense")
    assert sorted(kept) == sorted(calls)
    resumed = document(ask("passkey", *PASSKEY, "--json"))
    for method, figures in whole["methods"].items():
        for name in ("samples", "score", "interval", "kv_read_fraction", "accepted_per_round", "complete"):
            assert resumed["methods"][method][name] == figures[name]


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Raise when so many answers are written."""
    append, calls = RunFolder.append, []

    def stopped(self, method, answer):
        append(self, method, answer)
        calls.append(answer.id)
        if len(calls) == count:
            raise error

    monkeypatch.setattr(RunFolder, "append", stopped)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("lost"), 1)])
def test_a_run_that_is_cut_short_has_a_document_too(
    ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    stop_after(monkeypatch, 1, error)
    result = ask("passkey", *PASSKEY, "--json")
    assert result.exit_code == code
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["run"] == str(tmp_path / "run") and report["complete"] is False
    kept = len(RunFolder(tmp_path / "run").answers("dense"))
    assert [figures["samples"] for figures in report["methods"].values()] == [kept, 0] and kept >= 1
    assert "streaming:budget=0.3" in result.stderr


def test_a_run_that_was_killed_is_summed_up_without_weights(
    ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = document(ask("passkey", *PASSKEY, "--json", folder="whole"))
    assert whole["complete"] is True and whole["asked"] == 4
    write = RunFolder.write_summary
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        # What is written after the beginning is what a killed process does not write.
        patch.setattr(
            RunFolder,
            "write_summary",
            lambda self, summary: (self.path / "summary.json").exists() or write(self, summary),
        )
        assert ask("passkey", *PASSKEY).exit_code == 130

    def load(self, device):
        raise AssertionError("weights were read")

    monkeypatch.setattr("specattn.pairs.load.FoundPair.load", load)
    page = tmp_path / "page.html"
    report = document(run("report", tmp_path / "whole", tmp_path / "run", "--out", page, "--json"))
    assert report["page"] == str(page) and page.exists()
    assert [source["kind"] for source in report["sources"]] == ["task passkey"] * 2
    found, killed = report["tasks"]
    assert found == whole
    kept = len(RunFolder(tmp_path / "run").answers("dense"))
    assert kept >= 3 and killed["complete"] is False and killed["config"] == whole["config"]
    assert [figures["samples"] for figures in killed["methods"].values()] == [kept, 0]


def test_without_a_folder_the_same_command_finds_its_run(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", "passkey", "--length", 400, *tiny.models, "--methods", "dense", "--json"]
    runs = [document(run(*command, "--samples", count))["run"] for count in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert Path(runs[0]).parent == Path("runs") and Path(runs[0]).name.startswith("passkey-")


def test_progress_counts_answers(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = record_progress(monkeypatch, "specattn.cli.tasks.execute")
    assert ask("passkey", *PASSKEY).exit_code == 0
    assert shown == {"dense": [4, 4], "streaming:budget=0.3": [4, 4]}


def test_needle_draws_a_heat_map(ask, tmp_path: Path) -> None:
    plot, text = tmp_path / "map.png", tmp_path / "book.txt"
    text.write_text("It rained. " * 200, encoding="utf-8")
    sizes = ["--length", 400, "--length", 500, "--depth", 0, "--depth", 100, "--samples", 1]
    report = document(ask("needle", *sizes, "--text", text, "--plot", plot, "--json"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list(report["methods"]["dense"]["groups"]) == [
        "400 at 0 %",
        "400 at 100 %",
        "500 at 0 %",
        "500 at 100 %",
    ]
    assert report["config"]["options"]["text"] == str(text)


def test_the_heat_maps_cells_are_means(tmp_path: Path) -> None:
    from specattn.evaluation.tasks.heat_map import grid

    def answer(depth: float, length: int, score: float, error: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(metadata={"depth": depth, "length": length}, score=score, error=error)

    answers = [answer(0.5, 64, 1), answer(0.5, 64, 0), answer(0, 64, 1), answer(0, 64, 0, "lost")]
    assert grid(answers) == {(0.0, 64): 1.0, (0.5, 64): 0.5}


def test_ruler_says_what_it_left_out(ask) -> None:
    sizes = ["--task", "niah_single_1", "--task", "qa_1", "--length", 500, "--samples", 2]
    result = ask("ruler", *sizes, "--json", methods="dense")
    figures = document(result)["methods"]["dense"]
    assert figures["samples"] == 2
    assert figures["left_out"] == {"qa_1 needs its data: give a JSON file with --qa": 2}
    assert "left out: 2, qa_1 needs its data" in result.stderr


def test_a_prompt_beyond_the_context_is_left_out(ask) -> None:
    sizes = ["--length", 400, "--length", 600, "--samples", 1]
    figures = document(ask("passkey", *sizes, "--json", methods="dense"))["methods"]["dense"]
    assert figures["samples"] == 1
    assert figures["left_out"] == {"longer than the context of 512 tokens": 1}


def test_humaneval_runs_what_comes(ask, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = {
        "prompt": "def one():\n    return 1\n\n\n# ",
        "entry_point": "one",
        "test": "def check(f):\n    pass",
    }
    data.write_text(json.dumps({"task_id": "Test/0", **row}) + "\n")
    result = ask("humaneval", "--data", data, "--max-new-tokens", 20, "--json", methods="dense")
    # The tests never fail, and what a random model writes stands in a comment.
    assert document(result)["methods"]["dense"]["score"] == 1
    assert "humaneval: pass@1" in result.stderr


def test_gsm8k_takes_the_first_problems(ask, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(5))
    )
    result = ask("gsm8k", "--data", data, "--limit", 2, "--json", methods="dense")
    assert result.exit_code == 2, "four worked problems are longer than the tiny context"
    assert "gsm8k has nothing to ask: longer than the context" in result.stderr


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("passkey", ["--length", 600, "--samples", 1], "nothing to ask: longer than the context of 512"),
        ("passkey", ["--length", 100], "use a longer --length"),
        ("passkey", [*PASSKEY, "--chat"], "has no chat template"),
        ("passkey", [*PASSKEY, "--gamma", "many"], "gamma"),
        ("passkey", [*PASSKEY, "--lossless"], "lossless with method 'dense'"),
        ("passkey", [*PASSKEY, "--prefill", "sprage"], "unknown prefill method"),
        ("needle", ["--text", "missing.txt"], "cannot read missing.txt"),
        ("ruler", ["--task", "niah"], "RULER has no task 'niah'"),
        ("ruler", ["--qa", "missing.json"], "cannot read missing.json"),
        ("humaneval", ["--data", "missing.jsonl"], "cannot read missing.jsonl"),
        ("gsm8k", ["--data", "owner/name"], "pip install datasets"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    ask, task: str, arguments: list[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self, device):
        raise AssertionError("weights were read")

    monkeypatch.setattr("specattn.pairs.load.FoundPair.load", load)
    result = ask(task, *arguments)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr


def test_options_of_a_run_are_those_of_every_task() -> None:
    from typer.main import get_command

    from specattn.cli.app import app

    tasks = get_command(app).commands["eval"].commands
    for name in ("passkey", "needle", "ruler", "humaneval", "gsm8k"):
        names = {param.name for param in tasks[name].params}
        assert set(RunOptions.__dataclass_fields__) <= names and "options" not in names
