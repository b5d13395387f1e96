"""The engine as a model of lm-evaluation-harness, against stand-ins of the harness's classes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from tiny import tiny_pair

import specattn
from specattn.errors import UsageError
from specattn.pairs import Pair


class Hook:
    """The harness's cache of answers."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, object, str]] = []

    def add_partial(self, attr: str, req: object, res: str) -> None:
        self.kept.append((attr, req, res))


class StandInLM:
    """What ``lm_eval.api.model.LM`` gives to its subclasses."""

    def __init__(self) -> None:
        self._rank = 0
        self.cache_hook = Hook()

    @property
    def rank(self) -> int:
        return self._rank


@dataclass
class Instance:
    """A request of the harness."""

    context: str
    options: dict[str, Any]

    @property
    def args(self) -> tuple[str, dict[str, Any]]:
        return self.context, self.options


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """The harness's registry, with this package's module imported anew under stand-ins."""
    registry: dict[str, type] = {}

    def register_model(*names: str) -> Callable[[type], type]:
        def decorate(cls: type) -> type:
            assert issubclass(cls, StandInLM)
            registry.update(dict.fromkeys(names, cls))
            return cls

        return decorate

    api = {"model": {"LM": StandInLM}, "registry": {"register_model": register_model}}
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in api.items():
        module = ModuleType(f"lm_eval.api.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lm_eval.api.{name}", module)
    monkeypatch.delitem(sys.modules, "specattn.lm_eval", raising=False)
    importlib.import_module("specattn.lm_eval")
    yield registry
    sys.modules.pop("specattn.lm_eval", None)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair("llama")


def test_answers_are_those_of_generate(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense", batch_size=2, gamma=2)
    prompts = ["a long prompt, " * 4, "b", "c c c"]
    asked = [Instance(prompt, {"until": [], "max_gen_toks": 6 + n}) for n, prompt in enumerate(prompts)]
    found = model.generate_until(asked, disable_tqdm=True)
    for n, (prompt, text) in enumerate(zip(prompts, found, strict=True)):
        expected = specattn.generate(pair, prompt, method="dense", gamma=2, max_new_tokens=6 + n)
        assert text == expected.text
        assert model.results[n].tokens == expected.tokens
    kept = model.cache_hook.kept
    assert sorted(entry[1][0] for entry in kept) == sorted(prompts)  # type: ignore[index]
    assert {entry[0] for entry in kept} == {"generate_until"}


def test_rounds_never_fall_back_to_dense_ones(
    models: dict[str, type], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["specattn.lm_eval"]
    given: list[dict[str, Any]] = []

    class Recorder(module.Engine):  # type: ignore[name-defined, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module, "Engine", Recorder)
    models["specattn"](pair=pair, method="dense", max_gen_toks=2).generate_until(
        [Instance("a", {})], disable_tqdm=True
    )
    assert [options["fallback"] for options in given] == [False]


def test_stop_strings(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense", max_gen_toks=12)
    (whole,) = model.generate_until([Instance("abc", {})], disable_tqdm=True)
    stop = whole[4]
    for until in (stop, [stop], ["", stop]):
        (text,) = model.generate_until([Instance("abc", {"until": until})], disable_tqdm=True)
        assert text == whole[: whole.index(stop)]


def test_a_long_prompt_loses_its_beginning(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense", max_length=40)
    long, short = "x" * 100 + "end" * 10, "end" * 10
    answers = model.generate_until(
        [Instance(text, {"max_gen_toks": 10}) for text in (long, short)], disable_tqdm=True
    )
    assert answers[0] == answers[1]
    assert [result.prompt_tokens for result in model.results] == [30, 30]
    with pytest.raises(UsageError, match="max_gen_toks lower"):
        model.generate_until([Instance("a", {"max_gen_toks": 40})])


def test_an_empty_prompt_and_no_request(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense", max_gen_toks=3)
    assert model.generate_until([]) == []
    model.generate_until([Instance("", {})], disable_tqdm=True)
    assert model.results[0].prompt_tokens == 1


def test_sampling(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense", max_gen_toks=12, seed=3)
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9}
    (text,) = model.generate_until([Instance("abc", options)], disable_tqdm=True)
    same = specattn.generate(
        pair, "abc", method="dense", max_new_tokens=12, temperature=1.3, top_p=0.9, seed=3
    )
    assert text == same.text


def test_log_likelihoods_are_refused(models: dict[str, type], pair: Pair) -> None:
    model = models["specattn"](pair=pair, method="dense")
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UsageError, match="generate_until"):
            ask([Instance("a", {})])


def test_options_of_tasks(models: dict[str, type]) -> None:
    from specattn.lm_eval import parse_options

    greedy = parse_options({"do_sample": False, "temperature": 0.7, "until": "\n", "num_beams": 1}, 256)
    assert (greedy.temperature, greedy.stop, greedy.max_new_tokens) == (0.0, ("\n",), 256)
    drawn = parse_options({"do_sample": True, "top_k": 5, "max_new_tokens": 8}, 256)
    assert (drawn.temperature, drawn.top_k, drawn.max_new_tokens) == (1.0, 5, 8)
    assert parse_options({}, 9).temperature == 0.0
    for options in ({"num_beams": 4}, {"repetition_penalty": 1.2}):
        with pytest.raises(UsageError, match=next(iter(options))):
            parse_options(options, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "no-such"}, "no-such"),
        ({"gamma": 0}, "gamma"),
        ({"prefill": "no-such"}, "no-such"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"mapping": "absent.safetensors"}, "absent.safetensors"),
    ],
)
def test_what_is_refused(
    models: dict[str, type], pair: Pair, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        models["specattn"](**{"pair": pair, **options})


@pytest.mark.parametrize(
    ("asked", "most", "batch"),
    [(None, None, 8), ("auto", None, 8), ("auto:2", 4, 4), (16, 4, 4), (3, None, 3)],
)
def test_batches(models: dict[str, type], asked: Any, most: int | None, batch: int) -> None:
    from specattn.lm_eval import _batch

    assert _batch(asked, most) == batch


def test_chat_templates(models: dict[str, type], pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models["specattn"](pair=pair, method="dense")
    with pytest.raises(UsageError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hello"}])
    template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(pair.tokenizer, "chat_template", template)
    assert model.apply_chat_template([{"role": "user", "content": "hello"}]) == "[hello]>"
    assert model.chat_template(True) == template and model.chat_template() == ""


def test_without_the_harness_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "specattn.lm_eval", raising=False)
    with pytest.raises(UsageError, match=r"pip install \"specattn\[lm-eval\]\""):
        importlib.import_module("specattn.lm_eval")
