"""The search for thresholds: within its bound on the text it read, and only for the model it read it with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from naive_sparge import example
from tiny import tiny_model, tiny_pair

from specattn.attention import attached
from specattn.errors import UsageError
from specattn.generation import generate
from specattn.geometry import KVGeometry
from specattn.pairs import Pair
from specattn.prefill.base import PrefillCall
from specattn.prefill.registry import parse_prefill
from specattn.prefill.thresholds import OFF, Thresholds
from specattn.prefill.trial import Trial
from specattn.prefill.tune import FIRST_SHARE, LAMS, LEAST_SPARSITY, TAUS, THETAS, tune_sparge
from specattn.prefill.tuned import TunedThresholds
from specattn.prefill.two_stage import two_stage_attention
from specattn.runner import ModelRunner

TOKENS, L1 = 512, 0.3


def runs(seed: int, length: int = 64) -> list[int]:
    """Runs of one token each: hidden states that are alike."""
    tokens = torch.randint(3, 90, (TOKENS // length,), generator=torch.Generator().manual_seed(seed))
    return tokens.repeat_interleave(length).tolist()


TEXTS = [runs(0), runs(1, 128)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return tiny_pair("llama", layers=2, max_positions=1024)


@pytest.fixture(scope="module")
def tuned(pair: Pair) -> TunedThresholds:
    return tune_sparge(pair, TEXTS, tokens=TOKENS, l1=L1)


def measured(pair: Pair, tuned: TunedThresholds) -> Trial:
    """What the thresholds do on the texts, in a pass of its own."""
    geometry, device = KVGeometry.from_config(pair.target.config, pair.dtype), torch.device("cpu")
    trial = Trial.of(lambda layer: [tuned.of_layer(layer, device)], tuned.int8, geometry, device)
    with attached(pair.target):
        runner = ModelRunner(pair.target, tokens=TOKENS, slots=1)
        for text in TEXTS:
            slot = runner.cache.allocate(TOKENS)
            runner.prefill(slot, text, method=trial)
            runner.cache.free(slot)
    return trial


def test_every_head_stays_within_the_bound_and_reports_what_it_does(pair, tuned):
    trial = measured(pair, tuned)
    assert (trial.l1 <= L1 + 1e-6).all()
    assert torch.allclose(trial.l1[..., 0], torch.tensor(tuned.l1, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(
        trial.sparsity[..., 0], torch.tensor(tuned.sparsity, dtype=torch.float64), atol=1e-5
    )
    assert trial.sparsity.mean() > 0.1
    assert (len(tuned.theta), len(tuned.theta[0])) == (2, 4)
    for table, values in ((tuned.theta, THETAS), (tuned.tau, (*TAUS, 1)), (tuned.lam, LAMS)):
        assert {value for row in table for value in row} <= set(values)


def test_a_smaller_bound_leaves_out_less_and_one_that_nothing_meets_leaves_heads_dense(pair, tuned):
    strict = tune_sparge(pair, TEXTS, tokens=TOKENS, l1=0.12)
    means = [float(torch.tensor(t.sparsity).mean()) for t in (strict, tuned)]
    assert means[0] < means[1]
    tau, sparsity = torch.tensor(strict.tau), torch.tensor(strict.sparsity)
    assert torch.equal(sparsity > LEAST_SPARSITY, tau < 1) and (sparsity[tau == 1] == 0).all()
    none = tune_sparge(pair, TEXTS, tokens=130, l1=1e-6)
    assert none.tau == [[1.0] * 4] * 2 and none.lam == [[OFF] * 4] * 2 and none.sparsity == [[0.0] * 4] * 2


def test_the_choice_is_the_sparsest_candidate_within_the_bound(pair, tuned):
    """The whole grid again, one candidate at a time."""
    first: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for theta in THETAS:
        for tau in TAUS:
            table = replace(tuned, theta=[[theta] * 4] * 2, tau=[[tau] * 4] * 2, lam=[[OFF] * 4] * 2)
            trial = measured(pair, table)
            for layer in range(2):
                for head in range(4):
                    figures = float(trial.sparsity[layer, head, 0]), float(trial.l1[layer, head, 0])
                    first.setdefault((layer, head), []).append(figures)
    chosen = measured(pair, replace(tuned, lam=[[OFF] * 4] * 2))
    for (layer, head), figures in first.items():
        best = max((sparsity for sparsity, l1 in figures if l1 <= FIRST_SHARE * L1), default=0.0)
        expected = best if best > LEAST_SPARSITY else 0.0
        assert float(chosen.sparsity[layer, head, 0]) == pytest.approx(expected, abs=1e-9)


def test_a_trial_leaves_the_prefill_dense_and_counts_over_chunks(pair):
    geometry, device = KVGeometry.from_config(pair.target.config, pair.dtype), torch.device("cpu")

    def candidates(layer: int) -> list[Thresholds]:
        return [Thresholds.uniform(0.2, tau, OFF, 4, device) for tau in (0.5, 1.0)]

    trials, logits = [], []
    with attached(pair.target):
        for chunk in (TOKENS, 128):
            trial = Trial.of(candidates, False, geometry, device)
            for method in (None, trial):
                runner = ModelRunner(pair.target, tokens=TOKENS, slots=1)
                slot = runner.cache.allocate(TOKENS)
                logits.append(runner.prefill(slot, TEXTS[0], chunk=chunk, method=method))
            trials.append(trial)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    assert torch.allclose(trials[0].l1, trials[1].l1, atol=1e-4)
    assert torch.allclose(trials[0].sparsity, trials[1].sparsity, atol=1e-9)
    assert (trials[0].l1[..., 1] < 1e-5).all() and (trials[0].sparsity[..., 1] == 0).all()
    assert (trials[0].l1[..., 0] > 1e-3).all()


def test_layers_with_a_sliding_window_are_left_alone():
    pair = tiny_pair("gemma3_text", layers=2, max_positions=1024)
    tuned = tune_sparge(pair, TEXTS[:1], tokens=256, l1=0.5)
    assert tuned.tau[0] == [1.0] * 4 and tuned.l1[0] == tuned.sparsity[0] == [0.0] * 4
    assert max(tuned.l1[1]) > 0


def test_the_file_comes_back_as_it_went_and_serves_a_generation(pair, tuned, tmp_path: Path):
    path = tmp_path / "sparge.json"
    tuned.save(path)
    assert TunedThresholds.load(path) == tuned
    text = f"sparge:tuned={path}"
    result = generate(pair, [TEXTS[0]], prefill=text, method="dense", max_new_tokens=3)[0]
    assert result.prefill == text and 0 < result.prefill_computed < 1


@pytest.mark.parametrize("int8", [False, True])
def test_every_layer_has_the_thresholds_of_the_file(tuned, tmp_path: Path, int8):
    path = tmp_path / "sparge.json"
    table = replace(tuned, tau=[[1.0] * 4, [0.5, 0.9, 0.8, 1.0]], int8=int8)
    table.save(path)
    method, (query, key, value) = parse_prefill(f"sparge:tuned={path}"), example(300, 300, head_dim=16)
    for layer in range(2):
        tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output = method.attention(PrefillCall(layer, *tokens, 0, 0.25))
        thresholds = table.of_layer(layer, torch.device("cpu"))
        expected = two_stage_attention(query, key, value, thresholds, start=0, scaling=0.25, int8=int8)
        assert torch.equal(output.out, expected.out[0].transpose(0, 1))
        assert output.computed == expected.computed.mean()


def test_a_file_of_another_model_is_refused(tuned, tmp_path: Path):
    path = tmp_path / "sparge.json"
    tuned.save(path)
    other = tiny_pair("llama", layers=3, max_positions=1024)
    with pytest.raises(
        UsageError, match="tuned for a llama model of 2 layers, not for a llama model of 3 layers"
    ):
        generate(other, [TEXTS[0]], prefill=f"sparge:tuned={path}", method="dense")


def broken(tuned: TunedThresholds, tmp_path: Path, **changes: object) -> str:
    path = tmp_path / "broken.json"
    tuned.save(path)
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "missing"}))
    return f"sparge:tuned={path}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mapping"}, "holds no thresholds"),
        ({"kind": "missing"}, "holds no thresholds"),
        ({"version": 7}, "version 7; this specattn reads version 1"),
        ({"tau": "missing"}, "holds no thresholds"),
        ({"extra": 1}, "holds no thresholds"),
        ({"tau": [[2.0] * 4] * 2}, "holds no thresholds"),
        ({"tau": [[0.9] * 4]}, "holds no thresholds"),
        ({"theta": [[0.5] * 3] * 2}, "holds no thresholds"),
        ({"lam": 3}, "holds no thresholds"),
    ],
)
def test_damaged_files_are_refused(pair, tuned, tmp_path: Path, changes, message):
    with pytest.raises(UsageError, match=message):
        parse_prefill(broken(tuned, tmp_path, **changes)).check(pair.target.config)


def test_files_that_are_none_are_refused(pair, tmp_path: Path):
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("text", "holds no thresholds"),
        ("list", "no thresholds"),
        ("none", "cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_prefill(f"sparge:tuned={tmp_path / name}.json").check(pair.target.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1": 0.0}, r"l1=0.0 is outside \(0, 1\)"),
        ({"l1": 1.0}, "l1=1.0"),
        ({"tokens": 0}, "tokens=0 is outside 1 to 1,024"),
        ({"tokens": 2000}, "tokens=2,000"),
        ({"tokens": 700}, "text 1 has 512 tokens and 700 are to be read"),
        ({"texts": []}, "no text to tune on"),
    ],
)
def test_a_search_that_cannot_be_is_refused(pair, options, message):
    with pytest.raises(UsageError, match=message):
        tune_sparge(pair, **{"texts": TEXTS, "tokens": TOKENS, **options})


def test_a_head_size_without_tiles_is_refused(pair):
    odd = Pair("odd", tiny_model("llama", head_dim=20), None, pair.tokenizer)
    with pytest.raises(UsageError, match="tune sparge: head_dim=20"):
        tune_sparge(odd, TEXTS, tokens=100)


def test_progress_is_told_of_both_stages(pair):
    done: dict[str, int] = {}

    def count(stage: str, tokens: int) -> None:
        done[stage] = done.get(stage, 0) + tokens

    tune_sparge(pair, TEXTS, tokens=130, progress=count)
    assert done == {"theta and tau": 260, "lam": 260}
