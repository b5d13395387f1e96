"""Sampled speculation yields the target's own distribution, and the test that says so notices a broken acceptance."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import cache

import pytest
import torch
from tiny import tiny_mapping, tiny_model, tiny_tokenizer
from transformers import TopKLogitsWarper

from specattn import lossless, sampling
from specattn.acceptance import Verdict, verify
from specattn.generation import generate
from specattn.pairs import Pair
from specattn.request import GenerationResult
from specattn.sampling import sample

PROMPT = [5, 40, 71, 13]
TOP_K = 3
TOKENS = 3
SIGNIFICANCE = 1e-4
TEMPERATURE = 1.2

Sequence = tuple[int, ...]


@cache
def pair() -> Pair:
    """A draft that is the target with some noise: it is right about half of the time."""
    target = tiny_model("llama", layers=2, hidden=32, heads=2, kv_heads=1)
    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(3)
    for parameter in draft.parameters():
        parameter += 0.022 * torch.randn(parameter.shape, generator=generator)
    return Pair("noisy", target, draft, tiny_tokenizer())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Passes as small as these are many times slower on two threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sampled(
    count: int, *, first_seed: int = 0, models: Pair | None = None, **options
) -> list[GenerationResult]:
    """Many continuations of one prompt, each with a seed of its own, all in one batch."""
    options = {"gamma": 2, "top_k": TOP_K, "method": "dense", **options}
    return generate(
        models or pair(),
        [PROMPT] * count,
        temperature=TEMPERATURE,
        seed=first_seed,
        max_new_tokens=TOKENS,
        max_batch=500,
        ignore_eos=True,
        **options,
    )


@cache
def exact_joint() -> dict[Sequence, float]:
    """The probability of every sequence of three tokens, from transformers' logits and its top-k."""
    joint: dict[Sequence, float] = {(): 1.0}
    for _ in range(TOKENS):
        ids = torch.tensor([PROMPT + list(sequence) for sequence in joint])
        with torch.inference_mode():
            logits = pair().target(ids).logits[:, -1].double() / TEMPERATURE
        rows = TopKLogitsWarper(TOP_K)(ids, logits).softmax(-1)
        joint = {
            (*sequence, token): probability * float(row[token])
            for (sequence, probability), row in zip(joint.items(), rows, strict=True)
            for token in row.nonzero()[:, 0].tolist()
        }
    assert len(joint) == TOP_K**TOKENS
    return joint


def p_value(results: list[GenerationResult]) -> float:
    """Pearson's chi-square test against the exact joint distribution; sequences it cannot have give 0."""
    counts = Counter(tuple(result.tokens) for result in results)
    joint = exact_joint()
    if set(counts) - set(joint):
        return 0.0
    # Rare sequences are counted together, so that every cell expects at least five.
    cells: list[tuple[float, int]] = []
    expected, seen = 0.0, 0
    for sequence in sorted(joint, key=joint.__getitem__):
        expected += joint[sequence] * len(results)
        seen += counts[sequence]
        if expected >= 5:
            cells.append((expected, seen))
            expected, seen = 0.0, 0
    assert len(cells) > 10
    cells[-1] = (cells[-1][0] + expected, cells[-1][1] + seen)
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_joint_distribution_is_the_targets():
    results = sampled(1500)
    decided = sum(result.rounds for result in results)
    accepted = sum(sum(result.accepted_per_round) for result in results)
    assert 0.25 < accepted / (2 * decided) < 0.75, "both acceptance and correction are at work"
    assert p_value(results) > SIGNIFICANCE


def test_the_draft_alone_is_far_from_it():
    """Or the test could not tell an engine that never corrects."""
    drafted = dataclasses.replace(pair(), target=pair().draft, draft=None)
    assert p_value(sampled(300, models=drafted)) < SIGNIFICANCE / 100


def test_plain_decoding_and_other_lengths_of_rounds():
    plain = dataclasses.replace(pair(), draft=None)
    assert p_value(sampled(500, models=plain)) > SIGNIFICANCE
    assert p_value(sampled(500, gamma=1)) > SIGNIFICANCE
    assert p_value(sampled(500, gamma=5, first_seed=10_000)) > SIGNIFICANCE


def test_a_full_selection_by_the_drafts_attention():
    mapping = tiny_mapping(pair())
    assert p_value(sampled(500, method="specattn:p=1:dense_layers=0", mapping=mapping)) > SIGNIFICANCE


def accept_always(draft_tokens, draft_probs, target_probs, u_accept, u_next) -> Verdict:
    return verify(draft_tokens, draft_probs, target_probs, torch.full_like(u_accept, -1), u_next)


def accept_what_is_possible(draft_tokens, draft_probs, target_probs, u_accept, u_next) -> Verdict:
    """Accepts every token to which the target gives any probability."""
    return verify(draft_tokens, draft_probs, target_probs, torch.zeros_like(u_accept), u_next)


def accept_never(draft_tokens, draft_probs, target_probs, u_accept, u_next) -> Verdict:
    """Corrects what needs no correction: the residual is not the target's distribution."""
    return verify(draft_tokens, draft_probs, target_probs, torch.full_like(u_accept, 1e9), u_next)


def correct_from_the_target(draft_tokens, draft_probs, target_probs, u_accept, u_next) -> Verdict:
    """After a rejection draws from the target itself, and not from what the draft left of it."""
    verdict = verify(draft_tokens, draft_probs, target_probs, u_accept, u_next)
    row = torch.take_along_dim(target_probs, verdict.accepted[:, None, None], dim=1).squeeze(1)
    return Verdict(verdict.accepted, sample(row, u_next))


@pytest.mark.parametrize(
    "broken", [accept_always, accept_what_is_possible, accept_never, correct_from_the_target]
)
def test_a_broken_acceptance_is_noticed(broken, monkeypatch):
    monkeypatch.setattr("specattn.speculation.verify", broken)
    assert p_value(sampled(600)) < SIGNIFICANCE / 100


def test_seeds_give_different_tokens_and_the_same_again():
    first, again = ([result.tokens for result in sampled(60, first_seed=7)] for _ in range(2))
    assert first == again
    assert len({tuple(tokens) for tokens in first}) > 10
    others = [result.tokens for result in sampled(60, first_seed=1000)]
    assert others != first
    # Prompt i draws with seed + i, whoever else is in the batch.
    assert [result.tokens for result in sampled(20, first_seed=27)] == first[20:40]


# The lossless mode


SPARSE = {"method": "streaming:budget=2:sink=1:dense_layers=0"}
LOSSLESS = {**SPARSE, "lossless": True, "lossless_every": 2}


def test_a_sparse_target_is_far_from_it():
    """Or the tests below could not tell a mode that verifies nothing."""
    assert p_value(sampled(600, **SPARSE)) < SIGNIFICANCE / 100


def test_the_lossless_mode_gives_the_dense_targets_distribution():
    results = sampled(900, **LOSSLESS)
    accepted, proposed = (
        sum(getattr(result.lossless, name) for result in results) for name in ("accepted", "proposed")
    )
    assert 0.25 < accepted / proposed < 0.9, "both acceptance and correction are at work"
    assert p_value(results) > SIGNIFICANCE


def test_other_lengths_of_cycles_a_draft_that_selects_and_none_at_all():
    assert p_value(sampled(300, **{**LOSSLESS, "lossless_every": 5, "first_seed": 20_000})) > SIGNIFICANCE
    plain = dataclasses.replace(pair(), draft=None)
    assert p_value(sampled(300, models=plain, **{**LOSSLESS, "first_seed": 30_000})) > SIGNIFICANCE
    drafted = {"method": "specattn:p=0.4:sink=0:window=0:dense_layers=0", "mapping": tiny_mapping(pair())}
    assert p_value(sampled(300, **{**LOSSLESS, **drafted, "first_seed": 40_000})) > SIGNIFICANCE


def deliver_what_was_run_ahead(self, batch, ahead):
    chosen, _ = verify_cycle(self, batch, ahead)
    counts = torch.tensor([len(tokens) for tokens in ahead])
    proposed = torch.tensor([tokens + [0] * (chosen.shape[1] - len(tokens)) for tokens in ahead])
    return proposed, counts


def deliver_the_rejected_token(self, batch, ahead):
    """Where the dense pass chose another token, keeps the one that was run ahead."""
    chosen, accepted = verify_cycle(self, batch, ahead)
    proposed = torch.tensor([tokens + [0] * (chosen.shape[1] - len(tokens)) for tokens in ahead])
    return proposed, accepted


def deliver_beyond_the_correction(self, batch, ahead):
    """Takes all of the dense pass's choices, those after a rejected token too."""
    chosen, _ = verify_cycle(self, batch, ahead)
    return chosen, torch.tensor([len(tokens) for tokens in ahead])


verify_cycle = lossless.LosslessSpeculator._verify


@pytest.mark.parametrize(
    "broken", [deliver_what_was_run_ahead, deliver_the_rejected_token, deliver_beyond_the_correction]
)
def test_a_broken_dense_verification_is_noticed(broken, monkeypatch):
    monkeypatch.setattr(lossless.LosslessSpeculator, "_verify", broken)
    assert p_value(sampled(600, **LOSSLESS)) < SIGNIFICANCE / 100


def test_races_that_are_run_again_at_every_position_are_noticed(monkeypatch):
    """Each token alone would have the right distribution, given those before it; not all three."""
    monkeypatch.setattr(
        lossless, "race", lambda probs, seed, at: sampling.race(probs, seed, torch.zeros_like(at))
    )
    assert p_value(sampled(600, **LOSSLESS)) < SIGNIFICANCE / 100
