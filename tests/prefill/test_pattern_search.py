"""The offline search: each head of a known pattern gets it, at one cost for all; and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_heads import BLOCK, LENGTH, call_of, local_head, slash_head, topic_head, vertical_head
from tiny import tiny_pair

from specattn.attention import DenseAttend, attached
from specattn.errors import UsageError
from specattn.kernels.check import error_ratio
from specattn.kernels.dense_attention import dense_attention
from specattn.prefill.base import PrefillCall
from specattn.prefill.head_patterns import HeadPattern, HeadPatterns
from specattn.prefill.minference import MInference
from specattn.prefill.pattern_search import SHAPES, ShapeSearch, choose_patterns
from specattn.prefill.registry import parse_prefill
from specattn.runner import ModelRunner

TOKENS = 400
TEXT = torch.randint(2, 96, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("llama")


@pytest.fixture(scope="module")
def patterns(pair) -> HeadPatterns:
    return choose_patterns(pair, [TEXT], tokens=TOKENS, budget=0.6)


def test_each_head_gets_its_pattern_within_the_budget() -> None:
    torch.manual_seed(1)
    vertical = vertical_head(torch.arange(5, 600, 23).tolist())
    call = call_of(vertical, slash_head(250), topic_head(), local_head())
    dense = dense_attention(call.query, [(call.key, call.value)], 0, 0, call.scaling)
    search = ShapeSearch(MInference(block=BLOCK, sink=1, window=1), budget=0.2)
    search.search(call, dense)
    errors, scales = search.errors[0], search.scales[0]
    assert errors.shape == scales.shape == (len(SHAPES), 4)
    best = [SHAPES[number] for number in errors.argmin(0).tolist()]
    assert [shape.kind for shape in best[:1] + best[2:]] == ["vertical-slash", "block-sparse", "a-shape"]
    assert best[1].kind == "vertical-slash"
    assert best[0].vertical > best[0].slash and best[1].slash > best[1].vertical
    assert errors.amin(0)[0] < 0.01 and errors.amin(0)[2] < 0.2
    for number, shape in enumerate(SHAPES):
        kind = search.method.evidence(call, shape.kind, range(4))
        allowed = 0.2 * LENGTH * (LENGTH + 1) / 2
        used = search.method.pattern(call, kind, shape.sizes(scales[number], LENGTH, BLOCK)).products(call)
        more = shape.sizes(scales[number] * 1.02 + 0.002, LENGTH, BLOCK)
        assert (used <= allowed).all()
        assert (search.method.pattern(call, kind, more).products(call) >= used).all()
        assert (used[scales[number] < 0.99] > 0.6 * allowed).all(), shape


def test_a_shape_that_cannot_keep_within_the_budget_is_out_of_the_question() -> None:
    torch.manual_seed(2)
    call = call_of(vertical_head([3]))
    dense = dense_attention(call.query, [(call.key, call.value)], 0, 0, call.scaling)
    search = ShapeSearch(MInference(block=BLOCK, window=300), budget=0.2)
    search.search(call, dense)
    finite = search.errors[0][:, 0].isfinite().tolist()
    assert finite == [shape.kind != "vertical-slash" for shape in SHAPES]


def test_the_search_names_a_pattern_for_every_head(pair, patterns: HeadPatterns) -> None:
    config = pair.target.config
    assert [len(heads) for heads in patterns.layers] == [
        config.num_attention_heads
    ] * config.num_hidden_layers
    assert 0 < patterns.error < 1
    assert (patterns.tokens, patterns.budget) == (TOKENS, 0.6)
    sizes = {"a-shape": 2, "vertical-slash": 2, "block-sparse": 1}
    for head in sum(patterns.layers, ()):
        assert sum(size > 0 for size in (head.vertical, head.slash, head.blocks)) <= sizes[head.kind]


def test_the_error_is_that_of_the_patterns(pair, patterns: HeadPatterns, tmp_path: Path) -> None:
    patterns.save(tmp_path / "heads.json")
    method = MInference(tuned=str(tmp_path / "heads.json"))
    errors = []

    class Compare(DenseAttend):
        def attend_request(self, step, call, request):
            out = super().attend_request(step, call, request)
            segments, _ = step.segments(call.layer, request, None)
            key, value = (torch.cat(parts) for parts in zip(*segments, strict=True))
            output = method.attention(
                PrefillCall(call.layer, call.query[request], key, value, 0, call.scaling)
            )
            errors.extend(error_ratio(output.out[:, head], out[:, head]) for head in range(out.shape[1]))
            return out

    with attached(pair.target):
        runner = ModelRunner(pair.target, tokens=TOKENS, slots=1)
        runner.prefill(runner.cache.allocate(TOKENS), TEXT, chunk=TOKENS, attend=Compare())
    assert sum(errors) / len(errors) == pytest.approx(patterns.error, rel=1e-4)


def test_sliding_window_layers_have_none() -> None:
    pair = tiny_pair("gemma3_text")
    patterns = choose_patterns(pair, [TEXT], tokens=TOKENS, budget=0.6)
    windows = [kind == "sliding_attention" for kind in pair.target.config.layer_types]
    assert any(windows)
    assert [not heads for heads in patterns.layers] == windows


def test_several_texts_are_averaged(pair) -> None:
    texts = [TEXT, TEXT[::-1]]
    both = choose_patterns(pair, texts, tokens=TOKENS, budget=0.6)
    first, second = (choose_patterns(pair, [text], tokens=TOKENS, budget=0.6) for text in texts)
    # The best shape of the mean is no better than the mean of the best shapes.
    assert both.error >= (first.error + second.error) / 2 - 1e-9
    assert both.text_hash not in (first.text_hash, second.text_hash)


def test_progress_counts_layers(pair) -> None:
    counts: list[int] = []
    choose_patterns(
        pair, [TEXT, TEXT], tokens=200, budget=0.9, progress=lambda what, count: counts.append(count)
    )
    assert sum(counts) == 2 * pair.target.config.num_hidden_layers


@pytest.mark.parametrize(
    "options,named",
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 10**6}, "tokens=1,000,000"),
        ({"tokens": 401}, "text 1 has 400"),
        ({"budget": 0.0}, "budget=0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": 0.01}, "below 0.157"),
    ],
)
def test_bad_input_is_refused_before_work(pair, options: dict[str, float], named: str, monkeypatch) -> None:
    monkeypatch.setattr("specattn.prefill.pattern_search.ModelRunner", None)
    with pytest.raises(UsageError, match=named):
        choose_patterns(pair, [TEXT], **{"tokens": TOKENS, "budget": 0.6, **options})


def test_no_text_is_refused(pair) -> None:
    with pytest.raises(UsageError, match="no text"):
        choose_patterns(pair, [], tokens=TOKENS, budget=0.6)


# The file.


def test_a_file_says_what_was_found(patterns: HeadPatterns, tmp_path: Path) -> None:
    patterns.save(tmp_path / "heads.json")
    assert HeadPatterns.load(tmp_path / "heads.json") == patterns
    method = parse_prefill(f"minference:tuned={tmp_path / 'heads.json'}:ratio=2")
    assert parse_prefill(method.spec()) == method


def test_a_tuned_method_uses_its_heads(pair, patterns: HeadPatterns, tmp_path: Path) -> None:
    patterns.save(tmp_path / "heads.json")
    method = MInference(tuned=str(tmp_path / "heads.json"), ratio=0.5)
    method.check(pair.target.config)
    call = replace(call_of(*[vertical_head([3])] * len(patterns.layers[1])), layer=1)
    assert method.heads(call) == [head.scaled(0.5) for head in patterns.layers[1]]


def test_another_model_is_refused(pair, patterns: HeadPatterns, tmp_path: Path) -> None:
    patterns.save(tmp_path / "heads.json")
    method = MInference(tuned=str(tmp_path / "heads.json"))
    with pytest.raises(UsageError, match=r"chosen for .* not for .*specattn tune minference"):
        method.check(pair.draft.config)
    MInference().check(pair.draft.config)


def test_a_missing_file_is_refused(pair, tmp_path: Path) -> None:
    method = MInference(tuned=str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match=r"none.json.*No such file.*specattn tune minference"):
        method.check(pair.target.config)


@pytest.mark.parametrize(
    "change,named",
    [
        ({"kind": "specattn-sparge"}, "holds no patterns"),
        ({"version": 2}, "version 2; .* reads version 1"),
        ({"layers": [[{"kind": "diagonal"}]]}, "holds no patterns"),
        ({"layers": [[{"kind": "a-shape", "slash": -1}]]}, "holds no patterns"),
        ({"layers": 3}, "holds no patterns"),
        ({"colour": "red"}, "holds no patterns"),
    ],
)
def test_a_damaged_file_is_refused(
    patterns: HeadPatterns, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    path = tmp_path / "heads.json"
    patterns.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=named):
        HeadPatterns.load(path)


@pytest.mark.parametrize("content", ["", "[]", "no JSON"])
def test_what_is_no_document_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(UsageError, match="holds no patterns"):
        HeadPatterns.load(tmp_path / "heads.json")


def test_a_file_that_cannot_be_written(patterns: HeadPatterns, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the patterns"):
        patterns.save(tmp_path / "file" / "heads.json")


def test_patterns_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="'diagonal' is unknown"):
        HeadPattern("diagonal")
    with pytest.raises(UsageError, match="negative"):
        HeadPattern("a-shape", slash=-1)
