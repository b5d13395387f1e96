"""RULER's 13 tasks: what each hides, how long it is, and how answers are scored."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from specattn.errors import UsageError
from specattn.evaluation.tasks.base import LeftOut, Sample
from specattn.evaluation.tasks.options import Integers, Names
from specattn.evaluation.tasks.ruler import Ruler
from specattn.evaluation.tasks.ruler.task import NEW_TOKENS

PAIR = SimpleNamespace(name="tiny", tokenizer=tiny_tokenizer(), context_limit=100_000)
LENGTH = 12_000
SAMPLES = 4
NEEDLE = re.compile(r"One of the special magic (numbers|UUIDs) for (\S+) is: (\S+)\.")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def qa(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """Small files with the shapes of SQuAD and HotpotQA."""
    folder = tmp_path_factory.mktemp("qa")
    filler = " ".join(["The town has a market and a mill."] * 20)
    paragraphs = [
        {
            "context": f"{filler} Town {n} was founded in {1500 + n}.",
            "qas": [
                {
                    "question": f"When was town {n} founded?",
                    "answers": [{"text": str(1500 + n)}, {"text": str(1500 + n)}, {"text": f"in {1500 + n}"}],
                    "is_impossible": False,
                },
                {"question": f"Who founded town {n}?", "answers": [], "is_impossible": True},
            ],
        }
        for n in range(60)
    ]
    squad = folder / "squad.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Towns", "paragraphs": paragraphs}]}))
    rows = [
        {
            "question": f"Where does the river of town {n} end?",
            "answer": f"Lake {n}",
            "context": [
                [f"Town {n}", [f"Town {n} lies on river {n}. ", filler]],
                [f"River {n}", [f"River {n} ends in Lake {n}. ", filler]],
            ],
        }
        for n in range(30)
    ]
    hotpot = folder / "hotpot.json"
    hotpot.write_text(json.dumps(rows))
    return Names([str(squad), str(hotpot)])


@pytest.fixture(scope="module")
def samples(qa: Names) -> dict[str, list[Sample]]:
    task = Ruler(length=Integers((LENGTH,)), samples_each=SAMPLES, qa=qa)
    found: dict[str, list[Sample]] = {}
    for sample in task.samples(PAIR):
        assert isinstance(sample, Sample)
        found.setdefault(str(sample.metadata["task"]), []).append(sample)
    return found


def text(sample: Sample) -> str:
    assert isinstance(sample.prompt, str)
    return sample.prompt


def needles(sample: Sample) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for _, name, value in NEEDLE.findall(text(sample)):
        found.setdefault(name, []).append(value)
    return found


def test_all_13_are_asked(samples) -> None:
    assert list(samples) == list(NEW_TOKENS) and len(samples) == 13
    assert {len(of_task) for of_task in samples.values()} == {SAMPLES}


@pytest.mark.parametrize("name", NEW_TOKENS)
def test_lengths(samples, name: str) -> None:
    shortest = 0.85 if name.startswith("qa") else 0.94  # documents are long and taken whole
    for sample in samples[name]:
        tokens = len(PAIR.tokenizer(text(sample) + sample.answer_prefix)["input_ids"])
        assert sample.max_new_tokens == NEW_TOKENS[name]
        assert shortest * LENGTH < tokens + sample.max_new_tokens <= LENGTH
        assert sample.group == f"{name} {LENGTH}"


@pytest.mark.parametrize("name", NEW_TOKENS)
def test_a_seed_has_its_samples(samples, name: str, qa: Names) -> None:
    def first(seed: int) -> Sample | LeftOut:
        task = Ruler(Names([name]), Integers((LENGTH,)), 1, qa=qa, seed=seed)
        return next(iter(task.samples(PAIR)))

    assert first(0) == samples[name][0]
    assert text(first(1)) != text(samples[name][0])
    assert len({text(sample) for sample in samples[name]}) == SAMPLES


SHAPES = {
    # names, values of each, names asked for
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_needles_are_there_once(samples, name: str) -> None:
    names, values, asked = SHAPES[name]
    for sample in samples[name]:
        found = needles(sample)
        assert len(found) == names and {len(given) for given in found.values()} == {values}
        question = text(sample).split("\n\n")[-1]
        wanted = [given for key, given in found.items() if key in question]
        assert len(wanted) == asked
        assert sorted(sample.references) == sorted(value for given in wanted for value in given)
        for reference in sample.references:
            assert text(sample).count(reference) == 1
            assert bool(UUID.fullmatch(reference)) == (name == "niah_single_3")


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_among_needles(samples, name: str) -> None:
    for sample in samples[name]:
        found = needles(sample)
        assert len(found) > 50 and {len(given) for given in found.values()} == {1}
        question = text(sample).split("\n\n")[-1]
        assert [given for key, given in found.items() if f"for {key} in" in question] == [sample.references]
        kinds = {bool(UUID.fullmatch(part)) for key, (value,) in found.items() for part in (key, value)}
        assert kinds == {name == "niah_multikey_3"}


def test_needles_stand_at_all_depths() -> None:
    task = Ruler(Names(["niah_single_2"]), Integers((3000,)), 40)
    depths = []
    for sample in task.samples(PAIR):
        assert isinstance(sample, Sample)
        depths.append(text(sample).index(sample.references[0]) / len(text(sample)))
    counts = Counter(int(4 * depth) for depth in depths)
    assert all(counts[quarter] >= 4 for quarter in range(4))


def test_variables_are_tracked(samples) -> None:
    for sample in samples["vt"]:
        example, asked = text(sample).split("Follow the variables")[1:]
        (value,) = re.findall(r"hold the value (\d+),", asked)
        held = [re.findall(rf"VAR (\S+) = {value}\.", asked)[0]]
        for before, after in ((b, a) for a, b in re.findall(r"VAR (\S+) = VAR (\S+)\.", asked)):
            assert before == held[-1], "in the order of the text, each takes its value from the one before"
            held.append(after)
        assert held == list(sample.references) and len(held) == 5
        assert not set(held) & set(re.findall(r"[A-Z]{5}", example))


def test_common_words_are_the_most_common(samples) -> None:
    for sample in samples["cwe"]:
        lists = text(sample).split("Below is a numbered list")
        words = Counter(re.findall(r"\d+\. (\S+)", lists[2]))
        assert sorted(word for word, _ in words.most_common(10)) == sorted(sample.references)
        assert set(words.values()) == {30, 3}
        example = Counter(re.findall(r"\d+\. (\S+)", lists[1]))
        assert not set(example) & set(words)
        shown = lists[1].split("in the list are:")[1]
        assert sorted(word for word, _ in example.most_common(10)) == sorted(re.findall(r"[\w-]+", shown))


def test_coded_words_follow_a_power_law(samples) -> None:
    for sample in samples["fwe"]:
        words = Counter(text(sample).split("\n\n")[1].split())
        ranked = [word for word, _ in words.most_common(5)]
        assert ranked[0] == "..." and ranked[1:4] == list(sample.references)
        assert words[ranked[1]] / words["..."] == pytest.approx(1 / 4, abs=0.02)
        assert words[ranked[4]] < words[ranked[3]]


def test_answers_are_among_the_documents(samples) -> None:
    for name in ("qa_1", "qa_2"):
        for sample in samples[name]:
            (number,) = re.findall(r"town (\d+)", text(sample).split("Question:")[1])
            held = f"founded in {1500 + int(number)}." if name == "qa_1" else f"ends in Lake {number}."
            documents = text(sample).split("\n\n")[1:-1]
            assert len(documents) > 10
            assert sum(held in document for document in documents) == 1
            assert len(set(documents)) == len(documents)
    assert len(samples["qa_1"][0].references) == 2, "equal answers count once"


def test_without_data_questions_are_left_out() -> None:
    items = list(Ruler(length=Integers((LENGTH,)), samples_each=1).samples(PAIR))
    left_out = [item for item in items if isinstance(item, LeftOut)]
    assert [item.reason for item in left_out] == [
        f"{name} needs its data: give a JSON file with --qa" for name in ("qa_1", "qa_2")
    ]


def test_scores(samples) -> None:
    task = Ruler()
    four, question = samples["niah_multivalue"][0], samples["qa_1"][0]
    assert task.score(four, " and ".join(four.references)) == 1
    assert task.score(four, ", ".join(four.references[:3])) == 0.75
    assert task.score(four, "none") == 0
    assert task.score(question, f"It was in {question.references[0]}") == 1
    upper = samples["vt"][0]
    assert task.score(upper, " ".join(upper.references).lower()) == 1


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RULER has no task 'niah'"):
        Ruler(Names(["niah"]))
    for content, message in [
        ('{"rows": []}', "neither the shape of SQuAD nor of HotpotQA"),
        ("[1, 2]", "neither the shape"),
        ("[]", "holds no question"),
        ("{", "is not JSON"),
    ]:
        path = tmp_path / "qa.json"
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            list(Ruler(qa=Names([str(path)])).samples(PAIR))


def test_what_does_not_fit_a_length_is_left_out() -> None:
    first, second = Ruler(Names(["cwe", "niah_single_1"]), Integers((1500,)), 1).samples(PAIR)
    assert isinstance(first, LeftOut) and isinstance(second, Sample)
    assert first.reason.startswith("cwe: the shortest prompt has") and "use a longer --length" in first.reason
    (item,) = Ruler(Names(["niah_multikey_2"]), Integers((1_000_000,)), 1).samples(PAIR)
    assert isinstance(item, LeftOut) and "names and there are" in item.reason
