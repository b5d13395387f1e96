"""A run: what is asked, kept, resumed and summed up."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

import pytest
from copy_task import Copy
from tiny import tiny_mapping, tiny_pair

from specattn.engine import Engine
from specattn.errors import SpecAttnError, UsageError
from specattn.evaluation.tasks.base import Sample
from specattn.evaluation.tasks.paired import paired
from specattn.evaluation.tasks.questions import questions
from specattn.evaluation.tasks.run_folder import RunFolder
from specattn.evaluation.tasks.runner import configuration, run_task
from specattn.generation import generate
from specattn.selection.registry import parse_method

PAIR = tiny_pair("llama")
MAPPING = tiny_mapping(PAIR)
METHODS = [parse_method("specattn:p=0.6:dense_layers=0"), parse_method("streaming:budget=0.3")]
ENGINE: dict[str, Any] = {"gamma": 3, "prefill": "dense"}
TIMED = ("seconds", "tokens_per_second")


def run(path: Path, task: Copy | None = None, methods=METHODS, **options: Any) -> dict[str, Any]:
    task = task or Copy()
    asked = questions(PAIR, task)
    config = configuration(PAIR, task, asked, mapping=MAPPING, **ENGINE)
    folder = RunFolder.open(path, config)
    return run_task(PAIR, task, asked, methods, folder, mapping=MAPPING, batch=4, **ENGINE, **options)


def lines(path: Path, method=METHODS[0]) -> list[dict[str, Any]]:
    text = RunFolder(path).samples_file(method.spec()).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMED}
    return value


def test_answers_are_those_of_generate(tmp_path: Path) -> None:
    run(tmp_path)
    samples = [item for item in Copy().samples(PAIR) if isinstance(item, Sample)]
    prompts = [str(sample.prompt) for sample in samples]
    for method in METHODS:
        expected = generate(
            PAIR, prompts, method=method, mapping=MAPPING, max_new_tokens=7, gamma=3, max_batch=4
        )
        found = {line["id"]: line for line in lines(tmp_path, method)}
        assert len(found) == len(samples) == 6
        for sample, result in zip(samples, expected, strict=True):
            line = found[sample.id]
            assert line["output"] == result.text
            assert line["score"] == Copy().score(sample, result.text)
            assert line["accepted_per_round"] == result.accepted_per_round
            assert line["metadata"] == sample.metadata and line["references"] == list(sample.references)


def test_figures_do_not_depend_on_the_order_of_the_lines(tmp_path: Path) -> None:
    from specattn.evaluation.tasks.summary import summarise

    run(tmp_path)
    answers = list(RunFolder(tmp_path).answers(METHODS[0].spec()).values())
    assert summarise(answers[::-1]) == summarise(answers)


def test_every_round_is_the_methods_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = []

    def recorded(*arguments: Any, **given: Any) -> Engine:
        options.append(given)
        return Engine(*arguments, **given)

    monkeypatch.setattr("specattn.evaluation.tasks.runner.Engine", recorded)
    run(tmp_path)
    assert [given["fallback"] for given in options] == [False, False]
    assert [given["max_batch"] for given in options] == [4, 4]


def test_the_summary_is_that_of_the_lines(tmp_path: Path) -> None:
    summary = run(tmp_path, Copy(long=2))
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for method in METHODS:
        figures, rows = summary["methods"][method.spec()], lines(tmp_path, method)
        groups = {name: [r["score"] for r in rows if r["group"] == name] for name in ("vowel", "consonant")}
        assert figures["samples"] == 6 and figures["complete"]
        assert figures["score"] == pytest.approx(fmean(map(fmean, groups.values())))
        assert figures["left_out"] == {"longer than the context of 512 tokens": 2, "no data": 1}
        assert figures["kv_read_fraction"] == pytest.approx(fmean(r["kv_read_fraction"] for r in rows))
        rounds = Counter(count for row in rows for count in row["accepted_per_round"])
        assert figures["accepted_per_round"] == [rounds[n] for n in range(max(rounds) + 1)]
        for name, scores in groups.items():
            assert figures["groups"][name]["score"] == pytest.approx(fmean(scores))


def test_methods_are_compared_with_dense_answers_sample_by_sample(tmp_path: Path) -> None:
    dense = parse_method("dense")
    summary = run(tmp_path, methods=[*METHODS, dense])["methods"]
    expected = {line["id"]: line for line in lines(tmp_path, dense)}
    assert "against_dense" not in summary[dense.spec()]
    for method in METHODS:
        groups: dict[str, list[float]] = {"vowel": [], "consonant": []}
        for line in lines(tmp_path, method):
            groups[line["group"]].append(line["score"] - expected[line["id"]]["score"])
        different = [difference for group in groups.values() for difference in group]
        against = summary[method.spec()]["against_dense"]
        assert against["samples"] == 6
        assert against["difference"] == pytest.approx(fmean(map(fmean, groups.values())))
        assert (against["better"], against["worse"]) == (
            sum(difference > 0 for difference in different),
            sum(difference < 0 for difference in different),
        )


def test_an_interval_of_differences_is_narrower_than_those_of_the_scores(tmp_path: Path) -> None:
    run(tmp_path, methods=METHODS[:1])
    answer = next(iter(RunFolder(tmp_path).answers(METHODS[0].spec()).values()))
    rising = {str(n): replace(answer, id=str(n), score=n / 10) for n in range(10)}
    above = {id: replace(other, score=other.score + 0.25) for id, other in rising.items()}
    above["9"] = replace(answer, id="9", error="out of memory")
    del above["0"]
    found = paired(above, rising)
    assert found is not None
    assert (found["samples"], found["better"], found["worse"]) == (8, 8, 0)
    assert found["difference"] == pytest.approx(0.25) and found["interval"] == pytest.approx((0.25, 0.25))
    assert paired({}, rising) is None


class Interrupted(Copy):
    """Raises when so many answers were scored."""

    error: BaseException
    after: int
    number: Iterator[int]

    def score(self, sample: Sample, output: str) -> float:
        if next(self.number) >= self.after:
            raise self.error
        return super().score(sample, output)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no score")])
@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_an_interrupted_run_goes_on(tmp_path: Path, after: int, error: BaseException) -> None:
    whole = run(tmp_path / "whole")
    Interrupted.after, Interrupted.error, Interrupted.number = after, error, itertools.count()
    with pytest.raises(type(error)):
        run(tmp_path / "run", Interrupted())
    partial = json.loads((tmp_path / "run" / "summary.json").read_text())["methods"]
    assert sum(figures["samples"] for figures in partial.values()) == after
    assert not all(figures["complete"] for figures in partial.values())
    asked: Counter[str] = Counter()
    resumed = run(tmp_path / "run", progress=lambda method, count: asked.update({method: count}))
    assert without_times(resumed) == without_times(whole)
    assert asked == {method.spec(): 6 for method in METHODS}
    for method in METHODS:
        assert [line["id"] for line in lines(tmp_path / "run", method)] != []
        assert len(lines(tmp_path / "run", method)) == 6
    environments = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(environments) == 1 and environments[0]["dtype"] == "float32"


class Waiting(Copy):
    """Scores nothing before it is told to."""

    told: Event

    def score(self, sample: Sample, output: str) -> float:
        assert self.told.wait(20), "the engine waits for a score"
        return super().score(sample, output)


def results_then(monkeypatch: pytest.MonkeyPatch, count: int, then: Callable[[], None]) -> None:
    """Call ``then`` when the engine has given so many results."""
    stream = Engine.stream

    def watched(self: Engine) -> Iterator[Any]:
        results = 0
        for update in stream(self):
            yield update
            results += update.result is not None
            if results == count:
                then()
                results += 1

    monkeypatch.setattr(Engine, "stream", watched)


def test_scores_do_not_hold_up_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Waiting.told = Event()
    results_then(monkeypatch, 6, Waiting.told.set)
    summary = run(tmp_path, Waiting(), methods=METHODS[:1])
    assert summary["methods"][METHODS[0].spec()]["samples"] == 6


def interrupt() -> None:
    Waiting.told.set()
    raise KeyboardInterrupt


def test_pending_scores_are_finished_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Waiting.told = Event()
    results_then(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Waiting(), methods=METHODS[:1])
    assert len(lines(tmp_path)) == 3


def test_an_interruption_while_the_last_scores_are_waited_for_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Waiting.told, waited = Event(), []

    def interrupted(pending: Any, **options: Any) -> Any:
        waited.append(len(pending))
        if len(waited) == 1:
            interrupt()
        return wait(pending, **options)

    monkeypatch.setattr("specattn.evaluation.tasks.scoring.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Waiting(), methods=METHODS[:1])
    assert waited[0] == len(lines(tmp_path)) == 6


def test_answers_whose_scores_nobody_waited_for_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", methods=METHODS[:1])
    Waiting.told = Event()

    def impatient(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specattn.evaluation.tasks.scoring.wait", impatient)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", Waiting(), methods=METHODS[:1])
    Waiting.told.set()
    assert RunFolder(tmp_path / "run").answers(METHODS[0].spec()) == {}
    assert without_times(run(tmp_path / "run", methods=METHODS[:1])) == without_times(whole)
    assert len(lines(tmp_path / "run")) == 6


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    whole = run(tmp_path)
    path = RunFolder(tmp_path).samples_file(METHODS[0].spec())
    content = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(content[:-cut])
        assert len(RunFolder(tmp_path).answers(METHODS[0].spec())) == 5
        assert without_times(run(tmp_path)) == without_times(whole)
        assert len(lines(tmp_path)) == 6


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SpecAttnError, match="No space left on device; nothing before it is lost"):
        run(tmp_path)
    assert len(lines(tmp_path)) >= 2
    assert all(figures["complete"] for figures in run(tmp_path)["methods"].values())


def test_another_method_joins_a_run(tmp_path: Path) -> None:
    first = run(tmp_path, methods=METHODS[:1])
    both = run(tmp_path, methods=METHODS[1:])
    assert list(both["methods"]) == [method.spec() for method in METHODS]
    assert both["methods"][METHODS[0].spec()] == first["methods"][METHODS[0].spec()]


def test_a_failed_answer_is_left_out_and_asked_again(tmp_path: Path) -> None:
    whole = run(tmp_path)
    folder = RunFolder.read(tmp_path)
    name = METHODS[0].spec()
    answer = folder.answers(name)["vowel-1"]
    folder.append(name, replace(answer, score=0.0, error="out of memory"))
    from specattn.evaluation.tasks.summary import summarise

    figures = summarise(folder.answers(name).values())
    assert figures["samples"] == 5 and figures["left_out"] == {"failed: out of memory": 1}
    assert without_times(run(tmp_path)) == without_times(whole)


def test_changed_questions_are_refused(tmp_path: Path) -> None:
    run(tmp_path, methods=METHODS[1:])
    with pytest.raises(UsageError, match=r"was begun with count=3, not 2; choose a new folder"):
        run(tmp_path, Copy(count=2))
    asked = questions(PAIR, Copy())
    changed = configuration(PAIR, Copy(), asked, mapping=MAPPING, gamma=2, prefill="dense")
    with pytest.raises(UsageError, match="gamma=3, not 2"):
        RunFolder.open(tmp_path, changed)
    with pytest.raises(UsageError, match="begun with mapping="):
        RunFolder.open(tmp_path, configuration(PAIR, Copy(), asked, **ENGINE))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files but no run"):
        run(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        RunFolder.read(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "cake"}')
    with pytest.raises(UsageError, match="holds no run"):
        RunFolder.read(tmp_path)


def test_a_run_that_another_process_is_beginning_is_the_same_run(tmp_path: Path) -> None:
    from specattn import files

    config = {"task": "copy"}
    with files._written_beside(tmp_path / "config.json", b"{", "the config"):
        RunFolder.open(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("other", [{"task": "copy"}, {"task": "echo"}])
@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_processes_makes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], links: bool
) -> None:
    link = os.link

    def overtaken(source: Path, target: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", link)
            RunFolder.open(tmp_path, other).add_environment({"gpu": "theirs"})
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    if other == {"task": "copy"}:
        assert RunFolder.open(tmp_path, {"task": "copy"}).environments() == [{"gpu": "theirs"}]
    else:
        with pytest.raises(UsageError, match="was begun with task='echo', not 'copy'"):
            RunFolder.open(tmp_path, {"task": "copy"})
    assert RunFolder.read(tmp_path).config()["task"] == other["task"]


def test_many_begin_one_run_at_once(tmp_path: Path) -> None:
    from threading import Barrier

    for number in range(20):
        barrier = Barrier(8)

        def begin(path: Path, barrier: Barrier) -> None:
            barrier.wait()
            RunFolder.open(path, {"task": "copy"}).write_summary({})

        with ThreadPoolExecutor(8) as pool:
            begun = [pool.submit(begin, tmp_path / str(number), barrier) for _ in range(8)]
        assert [future.exception() for future in begun] == [None] * 8
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == [
            "config.json",
            "summary.json",
        ]


def test_a_folder_that_links_cannot_be_made_in_holds_runs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert RunFolder.open(tmp_path, {"task": "copy"}).config()["task"] == "copy"


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(UsageError, match="copy has nothing to ask: no data"):
        questions(PAIR, Copy(count=0))
    with pytest.raises(UsageError, match="no chat template"):
        questions(PAIR, Copy(), chat=True)
    twice = type("Twice", (Copy,), {"samples": lambda self, pair: iter(2 * [Sample("a", "b", ["c"], 1)])})
    with pytest.raises(UsageError, match="two samples of copy are called 'a'"):
        questions(PAIR, twice())


def test_a_limit_counts_in_each_group() -> None:
    asked = questions(PAIR, Copy(), limit=2)
    assert [q.sample.id for q in asked.asked] == ["vowel-0", "consonant-0", "vowel-1", "consonant-1"]


def test_a_chat_has_the_answer_begun() -> None:
    from specattn.evaluation.tasks.questions import encode

    pair = tiny_pair("llama")
    pair.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[me]"
    sample = Sample("a", "Why?", [], 3, answer_prefix="As")
    messages = replace(sample, prompt=[{"role": "user", "content": "Why?"}])
    for item, chat in ((sample, True), (messages, False)):
        assert pair.tokenizer.decode(encode(pair, item, chat=chat)) == "[user]Why?[me]As"
    assert pair.tokenizer.decode(encode(pair, sample, chat=False)) == "Why?As"


def test_files_of_methods_have_plain_names(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.samples_file("twilight:base=(quest:budget=0.5):p=0.9").name == (
        "samples-twilight_base=_quest_budget=0.5_p=0.9.jsonl"
    )
