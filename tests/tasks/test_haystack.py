"""Prompts that hide something: how long they are, and where it stands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from specattn.errors import UsageError
from specattn.evaluation.tasks.haystack import Haystack, budget, fit, hide, text_haystack
from specattn.evaluation.tasks.needle import Needle
from specattn.evaluation.tasks.options import DataFile, Integers
from specattn.evaluation.tasks.passkey import Passkey

PAIR = SimpleNamespace(name="tiny", tokenizer=tiny_tokenizer(), context_limit=4096)


def tokens(sample) -> int:
    return len(PAIR.tokenizer(sample.prompt + sample.answer_prefix)["input_ids"])


@pytest.mark.parametrize("limit", [11, 12, 57, 1000, 98_765])
@pytest.mark.parametrize("each", [1, 7, 300])
def test_the_size_that_fits(limit: int, each: int) -> None:
    def render(count: int) -> str:
        return "x" * (10 + each * count)

    if len(render(1)) > limit:
        with pytest.raises(UsageError, match=f"shortest prompt has {len(render(1))} tokens"):
            fit(render, PAIR.tokenizer, limit)
        return
    size = fit(render, PAIR.tokenizer, limit)
    assert len(render(size)) <= limit
    assert len(render(size + 1)) > limit or len(render(size)) > 0.99 * limit
    assert fit(render, PAIR.tokenizer, limit, most=1) == 1


def test_sizes_that_grow_by_steps() -> None:
    def render(count: int) -> str:
        return "x" * (500 * (count // 3) + count)

    size = fit(render, PAIR.tokenizer, 3100)
    assert len(render(size)) <= 3100 < len(render(size + 1))


def test_needles_stand_at_their_depths() -> None:
    sentences = [str(number) for number in range(10)]
    assert hide(sentences, [(0.0, "a"), (0.5, "b"), (1.0, "c")]).split() == [
        *("a", "0", "1", "2", "3", "4", "b", "5", "6", "7", "8", "9", "c")
    ]


def test_a_haystack_begins_where_it_is_told_and_repeats() -> None:
    assert Haystack(["a", "b", "c"]).take(5, start=2) == ["c", "a", "b", "c", "a"]


def test_a_text_file_is_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("It was late. Who\nknocks? Nobody!  The end", encoding="utf-8")
    assert text_haystack(str(path)).sentences == ["It was late.", "Who knocks?", "Nobody!", "The end"]
    path.write_text("word " * 1000, encoding="utf-8")
    pieces = text_haystack(str(path)).sentences
    assert " ".join(pieces).split() == ["word"] * 1000 and max(map(len, pieces)) <= 240
    with pytest.raises(UsageError, match="cannot read"):
        text_haystack(str(tmp_path / "none.txt"))


def test_the_template_and_the_answer_are_part_of_the_length() -> None:
    assert budget(PAIR, 100, 16) == 84
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[me]"
    pair = SimpleNamespace(tokenizer=tokenizer)
    assert budget(pair, 100, 16) == 84 - len("[user][me]")
    with pytest.raises(UsageError, match="--length 20 leaves no room"):
        budget(pair, 20, 16)


def test_passkeys() -> None:
    task = Passkey(length=Integers((600, 3000)), samples_each=12, digits=6)
    samples = list(task.samples(PAIR))
    assert samples == list(task.samples(PAIR))
    assert [sample.group for sample in samples] == ["600"] * 12 + ["3000"] * 12
    for sample in samples:
        (key,) = sample.references
        assert len(key) == 6 and key.isdigit()
        assert sample.prompt.count(f"The pass key is {key}.") == 1
        assert sample.prompt.count(key) == 2
        assert 0.94 * int(sample.group) < tokens(sample) + sample.max_new_tokens <= int(sample.group)
        at = sample.prompt.index(key) / len(sample.prompt)
        if sample.group == "3000":
            assert at == pytest.approx(sample.metadata["depth"], abs=0.1)
    assert len({sample.references[0] for sample in samples}) == 24
    depths = [sample.metadata["depth"] for sample in samples]
    assert min(depths) < 0.2 and max(depths) > 0.8
    assert Passkey(seed=1, length=Integers((600,))) != task
    other = next(iter(Passkey(seed=1, length=Integers((600,)), digits=6).samples(PAIR)))
    assert other.references != samples[0].references


def test_the_needles_grid(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"Sentence number {n} says little." for n in range(900)), encoding="utf-8")
    lengths, depths = (700, 2500), (0, 30, 100)
    task = Needle(Integers(lengths), Integers(depths), 2, DataFile(text))
    samples = list(task.samples(PAIR))
    cells = [(s.metadata["length"], s.metadata["depth"]) for s in samples]
    assert cells == [(length, depth / 100) for length in lengths for depth in depths for _ in range(2)]
    for sample in samples:
        (code,) = sample.references
        length, depth = sample.metadata["length"], sample.metadata["depth"]
        assert sample.prompt.count(code) == 1
        assert 0.9 * length < tokens(sample) + sample.max_new_tokens <= length
        body = sample.prompt.split("\n\n")[1]
        room = len(body) - len("The access code of the ... vault is 1234567.")
        assert body.index("The access code") / room == pytest.approx(depth, abs=0.08)
        # The answer goes on from the prefix with the code.
        assert f"{sample.answer_prefix} {code}." in sample.prompt
    assert samples[0].references == samples[2].references, "a row of the grid differs in the depth alone"


def test_scores_are_1_for_what_was_hidden() -> None:
    for task in (Passkey(), Needle()):
        sample = next(iter(task.samples(PAIR)))
        assert task.score(sample, f" {sample.references[0]}. And then") == 1
        assert task.score(sample, f" {sample.references[0][:-1]}") == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Passkey(samples_each=0), "samples"),
        (lambda: Passkey(digits=0), "digits"),
        (lambda: Needle(depth=Integers((101,))), "--depth 101 is not a percentage"),
    ],
)
def test_options_that_cannot_be(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_options_from_text() -> None:
    from specattn.evaluation.tasks.registry import get_task, parse_task

    task = parse_task("needle:length=(1024,2048):depth=50:text=a.txt")
    assert task == Needle(Integers((1024, 2048)), Integers((50,)), text=DataFile("a.txt"))
    assert parse_task(task.spec()) == task
    with pytest.raises(UsageError, match=r"unknown task 'neddle'.*did you mean 'needle'"):
        get_task("neddle")
    with pytest.raises(UsageError, match="length='many' is not of type Integers"):
        parse_task("needle:length=many")
